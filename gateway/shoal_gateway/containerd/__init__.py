"""containerd's gRPC services, one module each: a thin translation to messages on the bus, and nothing kept."""
