"""Garbage collection: what is held by whom, leases, and the mark and sweep over all services."""
