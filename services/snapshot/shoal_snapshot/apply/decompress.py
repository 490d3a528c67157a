"""Decompressors: how a layer's bytes become a tar stream.

    for chunk in decompressor_of(media_type, head)(blob): …

A decompressor takes a `Source` and yields chunks of at most `CHUNK` bytes; a stream that is broken or ends early is
DATA_LOSS. One that needs more than a few MiB of memory says so first (`Source.reserve`). To add one, write such a
function and name its magic and its media type's ending in `_KNOWN`; one that is another program needs no code
(`external`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal_bus.archive.decompress import GZIP_MAGIC, ZSTD_MAGIC, gzip, plain, zstd
from shoal_bus.archive.zstd_frames import Source

from shoal_snapshot.apply.errors import Unacceptable

Decompressor = Callable[[Source], Iterator[bytes]]


@dataclass(frozen=True)
class Program:
    """One that decompresses. `environment` (`KEY=value`) comes beside this process's own. None for no `payload`."""

    command: list[str]
    environment: list[str]
    payload: bytes | None = None


_KNOWN: list[tuple[str, bytes, tuple[str, ...], Decompressor]] = [
    ("gzip", GZIP_MAGIC, ("+gzip", ".gzip"), gzip),
    ("zstd", ZSTD_MAGIC, ("+zstd", ".zstd"), zstd),
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
