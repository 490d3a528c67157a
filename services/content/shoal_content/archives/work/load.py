"""An image archive taken apart, in one pass: every member becomes a file in a directory, hashed on its way there.

Nothing of the archive's own names is used as a path: a file is called by its number, and `table.json` says which member
is where. Links are names for other members there, and nothing on disk. What isn't what its name says (`blobs/sha256/…`)
is DATA_LOSS.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_content.archives.work.compression import CHUNK, HEAD, compression_of, decompressed
from shoal_content.archives.work.errors import Corrupt, Unacceptable, WorkError, shown
from shoal_content.archives.work.tar import DIRECTORY, FILE, HARDLINK, Entry, TarReader, clean, resolved

TABLE = "table.json"
MAX_DOCUMENT_BYTES = 4 << 20
"""Of `index.json` and the like."""
DOCUMENTS = frozenset({"index.json", "manifest.json", "oci-layout", "repositories"})
_FREE_OF_SUSPICION, _MOST_SUSPICIOUS_RATIO = 1 << 30, 250
"""A compressed archive may become so many bytes whatever it is, and so many for each of its own."""
_OTHERS = {"xz": b"\xfd7zX", "bzip2": b"BZh"}
"""What archives may be compressed by elsewhere."""
_MAX_TRAILER = 64 << 20
_ALGORITHMS = {"sha256": 64, "sha512": 128}


@dataclass(frozen=True)
class Load:
    """An archive (a file, or a FIFO that somebody writes it to), and the empty directory that it is taken apart in."""

    archive: str
    directory: str


@dataclass
class Table:
    """What an archive holds: its members by name, and names for them that are links."""

    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`file` (in the directory), `digest` and `size`."""
    links: dict[str, str] = field(default_factory=dict)


class _Input:
    """The archive's own bytes, counted; the first ones may be looked at before they are read."""

    def __init__(self, fd: int) -> None:
        self._fd, self.offset, self._ahead = fd, 0, b""

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (data := os.read(self._fd, CHUNK)):
            self._ahead += data
        return self._ahead[:size]

    def read(self, size: int = -1, /) -> bytes:
        data, self._ahead = self._ahead, b""
        if not data:
            data = os.read(self._fd, CHUNK if size < 0 else size)
        elif 0 <= size < len(data):
            data, self._ahead = data[:size], data[size:]
        self.offset += len(data)
        return data


def load(job: Load, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Takes an archive apart. What it has written when it raises is whoever's that gave the directory."""
    fd = os.open(job.archive, os.O_RDONLY | os.O_CLOEXEC)
    try:
        told = os.fstat(fd)
        if not (stat.S_ISREG(told.st_mode) or stat.S_ISFIFO(told.st_mode)):
            raise Unacceptable("the archive is neither a file nor a FIFO")
        source, total = _Input(fd), told.st_size if stat.S_ISREG(told.st_mode) else 0
        if not source.peek(1):
            raise Corrupt("the archive is empty")
        table = Table()
        chunks = _plain(source, lambda: report(source.offset, total))
        reader = TarReader(chunks)
        for entry in reader:
            _take(entry, reader, table, Path(job.directory))
        _read_out(chunks)
    finally:
        os.close(fd)
    made = Path(job.directory, TABLE)
    made.write_text(json.dumps({"members": table.members, "links": table.links}))
    return {"bytes": source.offset}


def _plain(source: _Input, tell: Callable[[], None]) -> Iterator[bytes]:
    head, size = source.peek(HEAD), 0
    for program, magic in _OTHERS.items():
        if head.startswith(magic):
            hint = f"decompress it first, as by `{program} -dc`"
            raise Unacceptable(f"the archive is compressed by {program}: gzip and zstd are read", hint=hint)
    kind = compression_of(head)
    for chunk in decompressed(source, kind):
        size += len(chunk)
        if kind != "none" and size > _FREE_OF_SUSPICION + _MOST_SUSPICIOUS_RATIO * source.offset:
            raise WorkError(
                f"the archive grows more than {_MOST_SUSPICIOUS_RATIO} times when it is decompressed",
                hint="decompress it first if it is meant to",
                code="RESOURCE_EXHAUSTED",
            )
        tell()
        yield chunk


def _read_out(chunks: Iterator[bytes]) -> None:
    """Reads on to the stream's end, where a compression has its checksum, and whoever writes it is waiting."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > _MAX_TRAILER:
            raise Unacceptable("the archive goes on long after its end")


def _take(entry: Entry, reader: TarReader, table: Table, directory: Path) -> None:
    if entry.kind == DIRECTORY:
        if entry.name in table.members or entry.name in table.links:
            raise _twice(entry.name)
    elif entry.kind == FILE:
        _take_file(entry, reader, table, directory)
    else:
        leads = clean(os.fsencode(entry.link)) if entry.kind == HARDLINK else resolved(entry.name, entry.link)
        if entry.name in table.members or table.links.setdefault(entry.name, leads) != leads:
            raise _twice(entry.name)


def _take_file(entry: Entry, reader: TarReader, table: Table, directory: Path) -> None:
    if entry.name in DOCUMENTS and entry.size > MAX_DOCUMENT_BYTES:
        raise Unacceptable(f"archive member {entry.name!r}: {entry.size} bytes, more than {MAX_DOCUMENT_BYTES}")
    expected = _expected(entry.name)
    hashed = hashlib.new(expected.partition(":")[0] or "sha256")
    file = str(len(table.members))
    fd = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in reader.data():
            hashed.update(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]  # noqa: PLW2901 (what is left of it)
    finally:
        os.close(fd)
    digest = f"{hashed.name}:{hashed.hexdigest()}"
    if expected and digest != expected:
        raise Corrupt(f"archive member {shown(entry.name)!r}: its content is {digest}")
    member = {"file": file, "digest": digest, "size": entry.size}
    before = table.members.get(entry.name)
    if entry.name in table.links or (before is not None and before["digest"] != digest):
        raise _twice(entry.name)
    if before is not None:
        (directory / file).unlink()
        member = before
    table.members[entry.name] = member


def _expected(name: str) -> str:
    """The digest that a member is named for in an OCI layout (image-spec, image-layout.md#blobs); else nothing."""
    match name.split("/"):
        case ["blobs", algorithm, value] if algorithm in _ALGORITHMS:
            if len(value) != _ALGORITHMS[algorithm] or value.strip("0123456789abcdef"):
                raise Unacceptable(f"archive member {shown(name)!r}: is named for no digest")
            return f"{algorithm}:{value}"
    return ""


def _twice(name: str) -> WorkError:
    return Unacceptable(f"archive member {shown(name)!r}: is there twice, with different content")
