"""Where a layer's bytes go: hashed, compressed, hashed again, written to a pipe. Nothing in them tells when or where.

To add a compression, name it in `COMPRESSIONS` and in `_COMPRESSORS`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, Protocol

from shoal_snapshot.apply.errors import Unacceptable

_GZIP_LEVEL, _ZSTD_LEVEL = 2, 3
_BUFFER = 1 << 18

COMPRESSIONS = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}
"""What a layer's media type says of it."""


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _gzip() -> _Compressor:
    from isal import isal_zlib

    made: Any = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, 31)
    return made  # type: ignore[no-any-return]


def _zstd() -> _Compressor:
    import zstandard

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()


_COMPRESSORS: dict[str, Callable[[], _Compressor]] = {"none": _Plain, "gzip": _gzip, "zstd": _zstd}


def compression_of(media_type: str) -> str:
    """How a layer of that type is compressed. FAILED_PRECONDITION for one that can't be made here."""
    found = COMPRESSIONS.get(media_type)
    if found is None:
        raise Unacceptable(f"layers of type {media_type} can't be made", hint="gzip, zstd and plain tar can")
    return found


class Sink:
    """Takes a layer's tar, and writes its blob to `fd`."""

    def __init__(self, fd: int, compression: str) -> None:
        self._fd, self._compressor = fd, _COMPRESSORS[compression]()
        self._diff, self._blob = hashlib.sha256(), hashlib.sha256()
        self._held: list[bytes | memoryview] = []
        self._holds = 0
        self.uncompressed = self.written = 0

    def write(self, data: bytes | memoryview) -> None:
        """Takes bytes of the tar stream."""
        self._held.append(data)
        self._holds += len(data)
        if self._holds >= _BUFFER:
            self._pass_on()

    def finish(self) -> None:
        """Writes what is still held."""
        self._pass_on()
        self._out(self._compressor.flush())

    @property
    def diff_id(self) -> str:
        """The digest of the tar stream."""
        return f"sha256:{self._diff.hexdigest()}"

    @property
    def digest(self) -> str:
        """The digest of the blob."""
        return f"sha256:{self._blob.hexdigest()}"

    def _pass_on(self) -> None:
        data = b"".join(self._held)
        self._held.clear()
        self._holds = 0
        self._diff.update(data)
        self.uncompressed += len(data)
        self._out(self._compressor.compress(data))

    def _out(self, data: bytes) -> None:
        self._blob.update(data)
        self.written += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
