"""shoal's gateway: containerd's gRPC API on a Unix socket, and HTTP for health and metrics; a client of the bus."""
