"""A layer's blob as verified chunks of tar: read, hash, decompress and hash again in a thread of its own.

    with LayerStream(Blob(base, path, media_type, digest, size)) as layer:
        for chunk in layer.chunks(): …
        layer.verify(diff_id)

All the heavy work there releases the interpreter's lock, so that it runs beside the extraction.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from shoal_snapshot.apply.decompress import Program, decompressor_of
from shoal_snapshot.apply.errors import ApplyError, Corrupt, StartedOver, Starved
from shoal_snapshot.syscalls import open_beneath

MAX_LAYER_BYTES = 1 << 40
"""Uncompressed, however large the blob is."""
BOMB_BYTES, BOMB_RATIO = 1 << 34, 1100
"""A blob may become 16 GiB, or so many times its own size: no honest gzip stream comes to more (RFC 1951 ends at 1032).
What is written is bounded by the disk besides, which is RESOURCE_EXHAUSTED, too."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02
_LOOK_SECONDS = 0.1
_PLAIN_MEMORY = 8 << 20
"""What every decompressor may use (RFC 8878 has all support such windows); for more, one at a time."""
_AHEAD = 4


@dataclass(frozen=True)
class Blob:
    """Where a layer lies: a file at `path` below the directory `base`, and what its descriptor says.

    One that is `growing` is still being written by somebody, who verifies it himself. What he has written stays; where
    it was wrong, he begins another file under the same path. If the path goes, he has given up.
    """

    base: str
    path: str
    media_type: str
    digest: str
    size: int
    growing: bool = False
    programs: tuple[Program, ...] = ()
    """What it goes through before it is of that media type."""

    def open(self, flags: int = 0) -> int:
        """A descriptor of the file. NOT_FOUND whatever the reason: nothing is told of what isn't for its reader."""
        try:
            fd = open_beneath(self.base, self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
        except OSError:
            raise ApplyError(f"blob {self.digest}: not found where it was said to be", code="NOT_FOUND") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ApplyError(f"blob {self.digest}: not found where it was said to be", code="NOT_FOUND")
        return fd

    def whole(self) -> bool:
        """Whether all of it is there. NOT_FOUND."""
        fd = self.open()
        try:
            return os.fstat(fd).st_size >= self.size
        finally:
            os.close(fd)

    def identity(self) -> tuple[int, int] | None:
        """Which file is there now; None for none."""
        try:
            fd = self.open()
        except ApplyError:
            return None
        try:
            return identity_of(fd)
        finally:
            os.close(fd)


def identity_of(fd: int) -> tuple[int, int]:
    """What tells an open file from every other one."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Source:
    """The bytes of a blob as they come: hashed, or (of one that grows) waited for."""

    def __init__(self, blob: Blob, stopped: threading.Event, memory: str = "") -> None:
        self._blob, self._stopped = blob, stopped
        self._memory, self._memory_fd = memory, -1
        self.fd = blob.open()
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.identity = identity_of(self.fd)
        self.hash = None if blob.growing else hashlib.new(blob.digest.partition(":")[0])
        self.offset = 0
        self.waiting_since: float | None = None
        """Since when there is nothing to read that will be there later, by `time.monotonic`."""

    def peek(self, size: int) -> bytes:
        """The first bytes, which stay to be read."""
        if self._blob.growing:
            self._wait(min(size, self._blob.size))
        return os.pread(self.fd, size, 0)

    def read(self, size: int = -1, /) -> bytes:
        size = size if size > 0 else 1 << 20
        if self._blob.growing:
            size = min(size, self._blob.size - self.offset)
            if size:
                self._wait(self.offset + 1)
        data = os.read(self.fd, size)
        if self.hash is not None:
            self.hash.update(data)
        self.offset += len(data)
        return data

    def close(self) -> None:
        """Closes the file, and lets others have the memory."""
        os.close(self.fd)
        if self._memory_fd >= 0:
            os.close(self._memory_fd)

    def reserve(self, size: int, /) -> None:
        """Waits until so much memory may be used. Starved while not all of the blob is there to use it for."""
        if size <= _PLAIN_MEMORY or not self._memory or self._memory_fd >= 0:
            return
        if self._blob.growing and os.fstat(self.fd).st_size < self._blob.size:
            raise Starved
        self._memory_fd = os.open(self._memory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        while True:
            try:
                fcntl.flock(self._memory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._stopped.wait(_LONGEST_PAUSE):
                    raise ApplyError(f"blob {self._blob.digest}: is no longer wanted", code="ABORTED") from None

    def _wait(self, size: int) -> None:
        """Returns when the file has so many bytes."""
        pause, look = _FIRST_PAUSE, time.monotonic() + _LOOK_SECONDS
        while os.fstat(self.fd).st_size < size:
            now = time.monotonic()
            if self.waiting_since is None:
                self.waiting_since = now
            if now > look:
                look = now + _LOOK_SECONDS
                current = self._blob.identity()
                if current is None:
                    raise ApplyError(f"blob {self._blob.digest}: is no longer fetched", code="ABORTED")
                if current != self.identity:
                    raise StartedOver
            if self._stopped.wait(pause):
                raise ApplyError(f"blob {self._blob.digest}: is no longer wanted", code="ABORTED")
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.waiting_since = None


class LayerStream:
    """One layer, read once from its beginning to its end.

    NOT_FOUND: there is no such blob. DATA_LOSS: it isn't what its descriptor says, or can't be decompressed. Of one
    that grows, ABORTED when its writer has given up, and StartedOver.
    """

    def __init__(self, blob: Blob, diff_id: str = "", memory: str = "") -> None:
        self._blob, self._digest, self._size = blob, blob.digest, blob.size
        self._limit = min(MAX_LAYER_BYTES, max(BOMB_BYTES, BOMB_RATIO * blob.size))
        self._stop = threading.Event()
        self._source = Source(blob, self._stop, memory)
        self._diff = hashlib.new(diff_id.partition(":")[0] or "sha256")
        self._diff_name = diff_id.partition(":")[0] or "sha256"
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
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
        self._source.close()

    @property
    def identity(self) -> tuple[int, int]:
        """Which file it is that is read."""
        return self._source.identity

    @property
    def waiting(self) -> float:
        """For how many seconds there has been nothing to read."""
        since = self._source.waiting_since
        return time.monotonic() - since if since is not None else 0.0

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
        """Compares what was read with what was told: DATA_LOSS for the blob, FAILED_PRECONDITION for its diff ID.

        The digest of a blob that grows is its writer's to verify.
        """
        while self._source.read():
            pass
        if self._source.offset != self._size:
            raise Corrupt(f"blob {self._digest}: has {self._source.offset} bytes instead of {self._size}")
        if self._source.hash is not None:
            check_digest(self._digest, self._source.hash.hexdigest())
        if diff_id and self.diff_id != diff_id:
            raise ApplyError(
                f"layer {self._digest}: its diff ID is {self.diff_id}, the image says {diff_id}",
                code="FAILED_PRECONDITION",
            )

    def _plain(self) -> Iterator[bytes]:
        """The uncompressed stream, as it comes."""
        source, media_type = self._source, self._blob.media_type
        if not self._blob.programs:
            return decompressor_of(media_type, source.peek(16))(source)
        from shoal_snapshot.apply.external import external  # starts programs: not every worker needs it

        between = _Between(external(self._blob.programs)(source), source)
        return decompressor_of(media_type, between.peek(16))(between)

    def _read(self) -> None:
        put: Callable[[Any], None] = self._queue.put
        try:
            for chunk in self._plain():
                if self._stop.is_set():
                    return
                self._diff.update(chunk)
                self.uncompressed += len(chunk)
                if self.uncompressed > self._limit:
                    raise ApplyError(
                        f"layer {self._digest}: becomes more than {self._limit} bytes", code="RESOURCE_EXHAUSTED",
                        hint="it is a decompression bomb, or too large",
                    )  # fmt: skip
                put(chunk)
            put(None)
        except Exception as error:  # noqa: BLE001 (handed over: `chunks` raises it)
            put(error)


class _Between:
    """What programs write, for the decompressor of what that is."""

    def __init__(self, chunks: Iterator[bytes], source: Source) -> None:
        self._chunks, self._held = chunks, b""
        self.reserve = source.reserve

    def peek(self, size: int) -> bytes:
        """The first bytes, which stay to be read."""
        while len(self._held) < size and (chunk := next(self._chunks, b"")):
            self._held += chunk
        return self._held[:size]

    def read(self, size: int = -1, /) -> bytes:
        data, self._held = self._held or next(self._chunks, b""), b""
        if 0 < size < len(data):
            data, self._held = data[:size], data[size:]
        return data


def check_digest(digest: str, found: str) -> None:
    """DATA_LOSS unless the digest's hexadecimal part is what was found. What was found isn't told: it may be secret."""
    if digest.partition(":")[2] != found:
        raise Corrupt(f"blob {digest}: its content is another", hint="remove it and pull it again")


def hash_blob(blob: Blob) -> tuple[int, int]:
    """Verifies a blob that is whole by reading all of it; says which file it was."""
    fd = blob.open()
    with os.fdopen(fd, "rb") as file:
        found = hashlib.file_digest(file, blob.digest.partition(":")[0])
        check_digest(blob.digest, found.hexdigest())
        return identity_of(fd)
