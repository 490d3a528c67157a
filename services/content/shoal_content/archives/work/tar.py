"""Archives of images as tar: ustar, GNU long names and PAX (POSIX.1-2017, pax, "ustar Interchange Format").

    for entry in TarReader(chunks):
        for piece in reader.data(): …

    write(header("blobs/sha256/…", size)); write(data); write(padding(size)); …; write(END)

What is read is hostile (`shoal_bus.archive.tar`): besides, members and names are bounded here, and a name that leads
anywhere but down is refused. What is written depends on nothing but names and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal_bus.archive import tar
from shoal_bus.archive.tar import BLOCK

from shoal_content.archives.work.errors import Unacceptable, shown

FILE, HARDLINK, SYMLINK, DIRECTORY = "file", "hardlink", "symlink", "directory"
END = bytes(2 * BLOCK)
MAX_ENTRIES = 20_000
MAX_NAME = 512
MAX_EXTENDED_BYTES = 1 << 16
"""Of all the extended headers before one member."""

_KINDS = {tar.REGULAR: FILE, tar.HARDLINK: HARDLINK, tar.SYMLINK: SYMLINK, tar.DIRECTORY: DIRECTORY}
_LARGEST_OCTAL = 0o77777777777


@dataclass(slots=True)
class Entry:
    """One member: its name below the archive's root, without `.` and `..`; `link` as a link has it."""

    name: str
    kind: str
    size: int
    link: str = ""


class TarReader:
    """The members of a stream of chunks. A member's data is read before the next one is asked for, or passed over."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._reader = tar.TarReader(chunks, most_extended=MAX_EXTENDED_BYTES)
        self.data = self._reader.data

    def __iter__(self) -> Iterator[Entry]:
        for count, found in enumerate(self._reader, 1):
            if count > MAX_ENTRIES:
                raise Unacceptable(f"the archive has more than {MAX_ENTRIES} members")
            yield _entry(found)


def clean(name: bytes) -> str:
    """A member's name below the archive's root. FAILED_PRECONDITION for one that leads out of it, or nowhere."""
    text = name.decode("utf-8", "surrogateescape")
    if not name or b"\0" in name or len(name) > MAX_NAME:
        raise Unacceptable(f"archive member {shown(text)!r}: its name isn't one that an image has")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or ".." in parts:
        raise Unacceptable(f"archive member {shown(text)!r}: its name leads out of the archive")
    return "/".join(parts)


def resolved(name: str, link: str) -> str:
    """Where the symbolic link `name` of an archive leads, below its root. FAILED_PRECONDITION where that is outside."""
    parts = name.split("/")[:-1]
    if link.startswith("/"):
        raise Unacceptable(f"archive member {shown(name)!r}: a link out of the archive")
    for part in link.split("/"):
        if part == "..":
            if not parts:
                raise Unacceptable(f"archive member {shown(name)!r}: a link out of the archive")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def header(name: str, size: int, *, directory: bool = False) -> bytes:
    """A member's header: root's, of 1970; with a PAX header before it where ustar can't hold name or size."""
    plain = name.encode()
    records = b""
    if len(plain) > 100:
        records += _record("path", plain)
    if size > _LARGEST_OCTAL:
        records += _record("size", str(size).encode())
    ahead = b""
    if records:
        ahead = _ustar(b"pax", len(records), b"x", 0o644) + records + padding(len(records))
    kept = size if size <= _LARGEST_OCTAL else 0
    return ahead + _ustar(plain[:100], kept, b"5" if directory else b"0", 0o755 if directory else 0o644)


def padding(size: int) -> bytes:
    """The zeros behind a member of `size` bytes."""
    return bytes(-size % BLOCK)


def _ustar(name: bytes, size: int, kind: bytes, mode: int) -> bytes:
    fields = b"".join(
        (
            name.ljust(100, b"\0"), b"%07o\0" % mode, b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0,
            b" " * 8, kind, bytes(100), b"ustar\x0000", bytes(64), b"0000000\0", b"0000000\0",
        )
    )  # fmt: skip
    block = fields.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _record(key: str, value: bytes) -> bytes:
    """One PAX record, whose length counts itself."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(rest) + len(str(length)) != length:
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _entry(found: tar.Entry) -> Entry:
    kind = _KINDS.get(found.kind)
    if kind is None:
        raise Unacceptable(f"archive member {shown(found.name)!r}: neither a file nor a directory nor a link")
    if kind == FILE and found.name.endswith(b"/"):
        kind = DIRECTORY
    if kind in (HARDLINK, SYMLINK) and not 0 < len(found.link) <= MAX_NAME:
        raise Unacceptable(f"archive member {shown(found.name)!r}: a link to nowhere")
    return Entry(clean(found.name), kind, found.size, found.link.decode("utf-8", "surrogateescape"))
