"""Layers made of what differs between two mounts (OCI image-spec, layer.md, "Creating").

`changes` walks both trees and finds what differs; `archive` writes tar; `compress` makes the blob's bytes and digests;
`compute` puts these together in a process of its own; `computing` runs that for the service, and has the content
service take what comes out.
"""
