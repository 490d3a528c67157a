"""gzip and zstd, both ways, over streams of bytes.

    kind = compression_of(head)
    for chunk in decompressed(source, kind): …

    compressor = Compressor("zstd")
    for chunk in chunks: write(compressor.feed(chunk))
    write(compressor.end())

The same bytes are compressed to the same bytes: no time stamps, one thread, fixed levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from shoal_bus.archive.decompress import GZIP_MAGIC, ZSTD_MAGIC, gzip, plain, zstd

CHUNK = 1 << 20
_GZIP_LEVEL, _ZSTD_LEVEL = 2, 3
_MAGIC = {"gzip": GZIP_MAGIC, "zstd": ZSTD_MAGIC}
HEAD = 4
"""Bytes of the beginning that tell the compression."""


class Readable(Protocol):
    """Where bytes come from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def compression_of(head: bytes) -> str:
    """`gzip`, `zstd` or `none`, by the first bytes."""
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), "none")


def decompressed(source: Readable, kind: str) -> Iterator[bytes]:
    """The plain bytes in chunks. DATA_LOSS where the stream is broken, or ends early."""
    return {"gzip": gzip, "zstd": zstd}.get(kind, plain)(_Unreserved(source))


class _Unreserved:
    """A source whose reader has the memory it takes."""

    def __init__(self, source: Readable) -> None:
        self.read = source.read

    def reserve(self, size: int, /) -> None:
        """Nothing."""


class Compressor:
    """One stream, compressed by `kind`: `gzip`, `zstd`, or `none`."""

    def __init__(self, kind: str) -> None:
        self._object: Any = None
        if kind == "gzip":
            from isal import isal_zlib

            self._object = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, 31)
        elif kind == "zstd":
            import zstandard

            self._object = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()

    def feed(self, data: bytes) -> bytes:
        """What there is to write after `data`; it may be nothing yet."""
        return data if self._object is None else bytes(self._object.compress(data))

    def end(self) -> bytes:
        """The stream's last bytes."""
        return b"" if self._object is None else bytes(self._object.flush())
