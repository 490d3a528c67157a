"""gzip and zstd, decompressed as they come.

    for chunk in gzip(source): …

Each takes a `Source` and yields chunks of at most `CHUNK` bytes; a stream that is broken or ends early is DATA_LOSS.
One that needs more than a few MiB of memory says so first (`Source.reserve`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, cast

from shoal_bus.archive.errors import Corrupt
from shoal_bus.archive.zstd_frames import Source, ZstdFrames

CHUNK = 1 << 18
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_MAX_ZSTD_WINDOW = 1 << 27  # what zstd's own tools accept without being asked for more


def plain(source: Source) -> Iterator[bytes]:
    """No compression."""
    while chunk := source.read(CHUNK):
        yield chunk


def gzip(source: Source) -> Iterator[bytes]:
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
        # Zeros after the last member are padding (gzip(1)).
        while pending and not pending.strip(b"\0"):
            pending = source.read(CHUNK)


def zstd(source: Source) -> Iterator[bytes]:
    """Zstandard (RFC 8878): one frame or several, with their checksums verified."""
    import zstandard

    frames = ZstdFrames(source)
    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).stream_reader(
        cast("IO[bytes]", frames), read_size=CHUNK, read_across_frames=True
    )
    while True:
        try:
            chunk = reader.read(CHUNK)
        except zstandard.ZstdError as error:
            raise Corrupt(f"not valid zstd: {error}") from None
        if not chunk:
            break
        yield chunk
    if not frames.whole:
        raise Corrupt("truncated: its zstd stream doesn't end")
