"""A layer, compressed anew: read, verified, decompressed, hashed, compressed and hashed again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal_content.archives.work.compression import CHUNK, HEAD, Compressor, compression_of, decompressed
from shoal_content.archives.work.errors import Corrupt, Unacceptable

MAX_LAYER_BYTES = 1 << 43


@dataclass(frozen=True)
class Recompress:
    """A blob, as its descriptor tells, and the file that `compression` (`gzip`, `zstd`, `none`) of it goes to."""

    path: str
    digest: str
    size: int
    diff_id: str
    compression: str
    made: str


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, fd: int, algorithm: str) -> None:
        self._fd, self.hash, self.offset = fd, hashlib.new(algorithm), 0

    def read(self, size: int = -1, /) -> bytes:
        data = os.read(self._fd, size if size > 0 else CHUNK)
        self.hash.update(data)
        self.offset += len(data)
        return data


def recompress(job: Recompress, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Digest and size of what was made, which is on disk. DATA_LOSS for a blob that isn't what its digest says."""
    blob = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        made = os.open(job.made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            return _recompress(job, blob, made, report)
        finally:
            os.close(made)
    finally:
        os.close(blob)


def _recompress(job: Recompress, blob: int, made: int, report: Callable[[int, int], None]) -> dict[str, Any]:
    source = _Hashed(blob, job.digest.partition(":")[0])
    diff, result, size, plain = hashlib.new(job.diff_id.partition(":")[0]), hashlib.sha256(), 0, 0
    compressor = Compressor(job.compression)

    def write(data: bytes) -> None:
        nonlocal size
        result.update(data)
        size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(made, view) :]

    for chunk in decompressed(source, compression_of(os.pread(blob, HEAD, 0))):
        diff.update(chunk)
        plain += len(chunk)
        if plain > MAX_LAYER_BYTES:
            raise Unacceptable(f"layer {job.digest}: too large")
        write(compressor.feed(chunk))
        report(source.offset, job.size)
    write(compressor.end())
    while source.read():
        pass
    told = f"{source.hash.name}:{source.hash.hexdigest()}"
    if (told, source.offset) != (job.digest, job.size):
        raise Corrupt(f"blob {job.digest}: its content is {told}", hint="remove it and pull it again")
    if f"{diff.name}:{diff.hexdigest()}" != job.diff_id:
        raise Unacceptable(
            f"layer {job.digest}: its diff ID is {diff.name}:{diff.hexdigest()}, the image says {job.diff_id}"
        )
    os.fsync(made)
    return {"digest": f"sha256:{result.hexdigest()}", "size": size}
