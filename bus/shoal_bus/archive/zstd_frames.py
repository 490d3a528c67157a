"""Whether a zstd stream is whole. Its decoder takes the end of its input for the end of the data; a layer's may not.

A stream is a sequence of frames, a frame a header, blocks that tell their sizes, and perhaps a checksum (RFC 8878,
section 3). So it is enough to hop from one block's header to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

_MAGIC = 0xFD2FB528
_SKIPPABLE, _SKIPPABLE_MASK = 0x184D2A50, 0xFFFFFFF0
_RLE = 1


class Source(Protocol):
    """Where compressed bytes come from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...

    def reserve(self, size: int, /) -> None:
        """Says that so many bytes of memory are needed to decompress what has just been read; waits for them."""
        ...


class ZstdFrames:
    """A source of zstd that is watched as it is read: `whole` when what was read ends where a frame does."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._walk = _walk(source.reserve)
        self._wanted = next(self._walk)
        self._held = b""
        self._skip = 0
        self._broken = False

    def read(self, size: int = -1, /) -> bytes:
        """The source's next bytes."""
        data = self._source.read(size)
        if not self._broken:
            self._follow(data)
        return data

    @property
    def whole(self) -> bool:
        """Whether the stream may end here. Of one that is no zstd the decoder has said so already."""
        return self._broken or (not self._skip and not self._held and self._wanted == (4, True))

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            step = min(self._wanted[0] - len(self._held), len(data) - at)
            self._held += data[at : at + step]
            at += step
            if len(self._held) == self._wanted[0]:
                told, self._held = self._held, b""
                try:
                    skip = self._walk.send(told)
                except ValueError:
                    self._broken = True
                    return
                self._skip = skip[0]
                self._wanted = next(self._walk)


def _walk(on_window: Callable[[int], None]) -> Generator[tuple[int, bool], bytes, None]:
    """Asks for so many bytes (and says whether the stream may end before them), is sent them, and says how many to pass
    over then. `on_window` is told how much of what a frame has come to has to be kept to go on with it."""
    while True:
        magic = int.from_bytes((yield 4, True), "little")
        if magic & _SKIPPABLE_MASK == _SKIPPABLE:
            yield 0, False
            size = int.from_bytes((yield 4, False), "little")
            yield size, False
            continue
        if magic != _MAGIC:
            raise ValueError("no frame begins here")
        yield 0, False
        descriptor = (yield 1, False)[0]
        single_segment = descriptor >> 5 & 1
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        yield 0, False
        fields = yield content_size + dictionary + (0 if single_segment else 1), False
        on_window(int.from_bytes(fields[dictionary:], "little") if single_segment else _window(fields[0]))
        yield 0, False
        last = False
        while not last:
            header = int.from_bytes((yield 3, False), "little")
            last = bool(header & 1)
            kind, size = header >> 1 & 3, header >> 3
            checksum = 4 if last and descriptor >> 2 & 1 else 0
            yield (1 if kind == _RLE else size) + checksum, False


def _window(descriptor: int) -> int:
    base = 1 << 10 + (descriptor >> 3)
    return base + (base >> 3) * (descriptor & 7)
