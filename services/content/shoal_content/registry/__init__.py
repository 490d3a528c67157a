"""Registries: the interface a pull needs of one (`resolver`), and the OCI distribution protocol over HTTP (`http`)."""
