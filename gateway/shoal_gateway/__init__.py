"""shoal's gateway: containerd's gRPC API on a Unix socket, and HTTP for health and metrics; a client of the bus."""

import os

# A switch of grpc's, read at its first import: connections that its event engine accepts have each call go through
# one thread more, a quarter of what it takes. A grpc that has no such switch any more says so once, and goes on.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
