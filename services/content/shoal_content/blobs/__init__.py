"""The bytes: blobs and what namespaces see of them, ingests, claims, and what is rotten."""
