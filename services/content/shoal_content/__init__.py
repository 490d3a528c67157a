"""shoal's content service: blobs, ingests, images and namespaces, and pulls from registries."""
