"""gRPC over HTTP/2 for the gateway's Unix socket, on the event loop itself.

grpc's own server hands each call through four threads before Python sees it, and through as many on the way back, which
costs more than everything else that the gateway does for it. What a Unix socket needs of HTTP/2 is little.
"""
