"""Layers: from a blob on disk to files in a snapshot's directory (OCI image-spec, layer.md).

`stream` reads, verifies and decompresses; `tar` reads the archive; `extract` writes the files, through `directories`,
which keeps every path inside its root; `worker` is the process that does so, `pool` what runs workers for the service.
Everything a worker imports is light, and knows nothing of the bus.
"""
