"""An image archive, written: members in the order they are given, the same bytes for the same members.

Blobs are hashed on their way: an archive that is told to be done holds what its names say.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal_content.archives.work.errors import Corrupt, Unacceptable
from shoal_content.archives.work.tar import END, header, padding

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Save:
    """What goes where: to a file that is there (emptied first), or to a FIFO that somebody reads.

    A member is `name`, and `text` or (with `size` and `digest`) the `path` of a blob; without either it is a directory.
    """

    archive: str
    members: list[dict[str, Any]]


def save(job: Save, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Writes an archive. DATA_LOSS when a blob isn't what its digest says: what was written is no archive."""
    total = sum(member.get("size", len(member.get("text", ""))) for member in job.members)
    fd = os.open(job.archive, os.O_WRONLY | os.O_CLOEXEC)
    done = 0
    try:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise Unacceptable("the archive is to be neither a file nor a FIFO")
        if stat.S_ISREG(kind):
            os.ftruncate(fd, 0)
        for member in job.members:
            done += _member(fd, member)
            report(done, total)
        _write(fd, END)
        if stat.S_ISREG(kind):
            os.fsync(fd)
    finally:
        os.close(fd)
    return {"bytes": done}


def _member(fd: int, member: dict[str, Any]) -> int:
    name: str = member["name"]
    if "text" in member:
        data = member["text"].encode()
        _write(fd, header(name, len(data)) + data + padding(len(data)))
        return len(data)
    if "path" not in member:
        _write(fd, header(f"{name}/", 0, directory=True))
        return 0
    digest: str = member["digest"]
    size: int = member["size"]
    hashed, copied = hashlib.new(digest.partition(":")[0]), 0
    blob = os.open(member["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(blob).st_size != size:
            raise Corrupt(f"blob {digest}: has {os.fstat(blob).st_size} bytes instead of {size}")
        _write(fd, header(name, size))
        while data := os.read(blob, _CHUNK):
            hashed.update(data)
            copied += len(data)
            _write(fd, data)
        _write(fd, padding(size))
    finally:
        os.close(blob)
    if copied != size or f"{hashed.name}:{hashed.hexdigest()}" != digest:
        raise Corrupt(f"blob {digest}: its content is {hashed.name}:{hashed.hexdigest()}", hint="pull it again")
    return size


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
