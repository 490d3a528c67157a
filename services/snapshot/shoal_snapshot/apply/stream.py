"""A layer's blob as verified chunks of tar: read, hash, decompress and hash again in a thread of its own.

    with LayerStream(path, media_type, digest, size) as layer:
        for chunk in layer.chunks(): …
        layer.verify(diff_id)

All the heavy work there releases the interpreter's lock, so that it runs beside the extraction.
"""

from __future__ import annotations

import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from shoal_snapshot.apply.decompress import decompressor_of
from shoal_snapshot.apply.errors import ApplyError, Corrupt

MAX_LAYER_BYTES = 1 << 43
"""Uncompressed. What keeps a bomb from doing harm before that is the disk's own limit, which is RESOURCE_EXHAUSTED."""
_AHEAD = 4


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, fd: int, digest: str) -> None:
        self.fd, self.hash, self.offset = fd, hashlib.new(digest.partition(":")[0]), 0
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The first bytes, which stay to be read."""
        self._head = os.pread(self.fd, size, 0)
        return self._head

    def read(self, size: int = -1, /) -> bytes:
        data = os.read(self.fd, size if size > 0 else 1 << 20)
        self.hash.update(data)
        self.offset += len(data)
        return data


class LayerStream:
    """One layer, read once from its beginning to its end.

    DATA_LOSS: the blob isn't there, isn't what its descriptor says, or can't be decompressed.
    """

    def __init__(self, path: str, media_type: str, digest: str, size: int, diff_id: str = "") -> None:
        self._digest, self._size = digest, size
        self._fd = _open(path)
        self._source = _Hashed(self._fd, digest)
        self._diff = hashlib.new(diff_id.partition(":")[0] or "sha256")
        self._diff_name = diff_id.partition(":")[0] or "sha256"
        self._decompress = decompressor_of(media_type, self._source.peek(16))
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="layer", daemon=True)
        self.uncompressed = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            # A reader that waits for room in the queue must see that it is to stop.
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        os.close(self._fd)

    @property
    def offset(self) -> int:
        """Bytes of the blob that have been read."""
        return self._source.offset

    @property
    def diff_id(self) -> str:
        """The digest of the uncompressed stream, once it has been read to its end."""
        return f"{self._diff_name}:{self._diff.hexdigest()}"

    def chunks(self) -> Iterator[bytes]:
        """The uncompressed stream."""
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def verify(self, diff_id: str) -> None:
        """Compares what was read with what was told: DATA_LOSS for the blob, FAILED_PRECONDITION for its diff ID."""
        while self._source.read():
            pass
        told = f"{self._digest.partition(':')[0]}:{self._source.hash.hexdigest()}"
        if self._source.offset != self._size:
            raise Corrupt(f"blob {self._digest}: has {self._source.offset} bytes instead of {self._size}")
        if told != self._digest:
            raise Corrupt(f"blob {self._digest}: its content is {told}", hint="remove it and pull it again")
        if diff_id and self.diff_id != diff_id:
            raise ApplyError(
                f"layer {self._digest}: its diff ID is {self.diff_id}, the image says {diff_id}",
                code="FAILED_PRECONDITION",
            )

    def _read(self) -> None:
        put: Callable[[Any], None] = self._queue.put
        try:
            for chunk in self._decompress(self._source):
                if self._stop.is_set():
                    return
                self._diff.update(chunk)
                self.uncompressed += len(chunk)
                if self.uncompressed > MAX_LAYER_BYTES:
                    raise ApplyError(f"layer {self._digest}: too large", code="RESOURCE_EXHAUSTED")
                put(chunk)
            put(None)
        except Exception as error:  # noqa: BLE001 (handed over: `chunks` raises it)
            put(error)


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ApplyError(f"blob {path}: {error.strerror}", code="NOT_FOUND") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ApplyError(f"blob {path}: not a file", code="FAILED_PRECONDITION")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd
