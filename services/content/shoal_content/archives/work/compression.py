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
from typing import IO, Any, Protocol, cast

from shoal_content.archives.work.errors import Corrupt

CHUNK = 1 << 20
_MAX_ZSTD_WINDOW = 1 << 27  # what zstd's own tools accept without being asked for more
_GZIP_LEVEL, _ZSTD_LEVEL = 2, 3
_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
HEAD = 4
"""Bytes of the beginning that tell the compression."""


class Source(Protocol):
    """Where bytes come from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def compression_of(head: bytes) -> str:
    """`gzip`, `zstd` or `none`, by the first bytes."""
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), "none")


def decompressed(source: Source, kind: str) -> Iterator[bytes]:
    """The plain bytes in chunks of at most `CHUNK`. DATA_LOSS where the stream is broken."""
    match kind:
        case "gzip":
            yield from _gunzip(source)
        case "zstd":
            yield from _unzstd(source)
        case _:
            while chunk := source.read(CHUNK):
                yield chunk


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


def _gunzip(source: Source) -> Iterator[bytes]:
    """gzip (RFC 1952): one member or several, with their checksums verified."""
    from isal import isal_zlib

    failed: Any = isal_zlib.error  # its stubs have an instance where the class is
    pending = source.read(CHUNK)
    while pending:
        member = isal_zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                chunk = member.decompress(pending, CHUNK)
            except failed as error:
                raise Corrupt(f"not valid gzip: {error}") from None
            pending = member.unconsumed_tail
            if chunk:
                yield chunk
            if not pending and not member.eof:
                pending = source.read(CHUNK)
                if not pending and not chunk:
                    raise Corrupt("truncated: its gzip stream doesn't end")
        pending = member.unused_data or source.read(CHUNK)
        while pending and not pending.strip(b"\0"):  # zeros after the last member are padding (gzip(1))
            pending = source.read(CHUNK)


def _unzstd(source: Source) -> Iterator[bytes]:
    """Zstandard (RFC 8878): one frame or several, with their checksums verified.

    Its decoder takes the end of its input for the end of the data: whoever reads this knows by itself what is missing.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    reader = decompressor.stream_reader(cast("IO[bytes]", source), read_size=CHUNK, read_across_frames=True)
    while True:
        try:
            chunk = reader.read(CHUNK)
        except zstandard.ZstdError as error:
            raise Corrupt(f"not valid zstd: {error}") from None
        if not chunk:
            return
        yield chunk
