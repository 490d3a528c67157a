"""Decompressors: how a layer's bytes become a tar stream.

    for chunk in decompressor_of(media_type, head)(blob): …

A decompressor takes a `Source` and yields chunks of at most `CHUNK` bytes; a stream that is broken or ends early is
DATA_LOSS. One that needs more than a few MiB of memory says so first (`Source.reserve`). To add one, write such a
function and name its magic and its media type's ending in `_KNOWN`; one that is another program needs no code
(`external`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from shoal_snapshot.apply.errors import Corrupt, Unacceptable
from shoal_snapshot.apply.zstd_frames import Source, ZstdFrames

CHUNK = 1 << 18
_MAX_ZSTD_WINDOW = 1 << 27  # what zstd's own tools accept without being asked for more


Decompressor = Callable[[Source], Iterator[bytes]]


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
                raise Corrupt(f"the layer isn't valid gzip: {error}") from None
            pending = member.unconsumed_tail
            if chunk:
                yield chunk
            if not pending and not member.eof:
                pending = source.read(CHUNK)
                if not pending and not chunk:
                    raise Corrupt("the layer is truncated: its gzip stream doesn't end")
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
            raise Corrupt(f"the layer isn't valid zstd: {error}") from None
        if not chunk:
            break
        yield chunk
    if not frames.whole:
        raise Corrupt("the layer is truncated: its zstd stream doesn't end")


_KNOWN: list[tuple[str, bytes, tuple[str, ...], Decompressor]] = [
    ("gzip", b"\x1f\x8b\x08", ("+gzip", ".gzip"), gzip),
    ("zstd", b"\x28\xb5\x2f\xfd", ("+zstd", ".zstd"), zstd),
]


def decompressor_of(media_type: str, head: bytes) -> Decompressor:
    """The decompressor for a layer that begins with `head`.

    The magic decides, as registries hold layers whose media type is wrong. A media type that promises a compression
    that isn't there is read as plain; one that nobody here knows is FAILED_PRECONDITION.
    """
    for _, magic, _, decompressor in _KNOWN:
        if head.startswith(magic):
            return decompressor
    _, plus, suffix = media_type.partition("+")
    if plus and not any(f"+{suffix}" in endings for _, _, endings, _ in _KNOWN):
        raise Unacceptable(f"layers of type {media_type} can't be read", hint="gzip, zstd and plain tar can")
    return plain
