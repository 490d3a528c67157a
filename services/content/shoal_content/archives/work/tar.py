"""Archives of images as tar: ustar, GNU long names and PAX (POSIX.1-2017, pax, "ustar Interchange Format").

    for entry in TarReader(chunks):
        for piece in reader.data(): …

    write(header("blobs/sha256/…", size)); write(data); write(padding(size)); …; write(END)

What is read is hostile: checksums are verified, headers, names and members bounded, and a name that leads anywhere but
down is refused. What is written depends on nothing but names and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal_content.archives.work.errors import Corrupt, Unacceptable, shown

BLOCK = 512
FILE, HARDLINK, SYMLINK, DIRECTORY = "file", "hardlink", "symlink", "directory"
END = bytes(2 * BLOCK)
MAX_ENTRIES = 20_000
MAX_NAME = 512
MAX_EXTENDED_BYTES = 1 << 16
"""Of all the extended headers before one member."""
MAX_FILE_BYTES = 1 << 43

_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"1": HARDLINK, b"2": SYMLINK, b"5": DIRECTORY,
}  # fmt: skip
_ZEROS = bytes(BLOCK)
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
        self._chunks = chunks
        self._buffer, self._at = b"", 0
        self._unread = self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        count = 0
        while True:
            for _ in self.data():
                pass
            self._skip(self._padding)
            entry = self._entry()
            if entry is None:
                return
            count += 1
            if count > MAX_ENTRIES:
                raise Unacceptable(f"the archive has more than {MAX_ENTRIES} members")
            self._unread, self._padding = entry.size, -entry.size % BLOCK
            yield entry

    def data(self) -> Iterator[memoryview]:
        """The current member's bytes, in pieces that are good until the next one."""
        while self._unread:
            if self._at == len(self._buffer):
                self._fill()
            piece = memoryview(self._buffer)[self._at : self._at + self._unread]
            self._at += len(piece)
            self._unread -= len(piece)
            yield piece

    def _entry(self) -> Entry | None:
        """The next member, its extended headers applied."""
        told: dict[str, bytes] = {}
        extended = 0
        while True:
            block = self._block()
            if block is None:
                if told:
                    raise Corrupt("the archive ends after an extended header")
                return None
            kind = block[156:157]
            if kind not in (b"x", b"g", b"L", b"K"):
                return _entry(block, told)
            size = _number(block[124:136])
            extended += size
            if not 0 <= size <= MAX_EXTENDED_BYTES or extended > MAX_EXTENDED_BYTES:
                raise Unacceptable(f"the archive has extended headers of more than {MAX_EXTENDED_BYTES} bytes")
            body = self._take(size)
            self._skip(-size % BLOCK)
            if kind == b"L":
                told["path"] = body.split(b"\0", 1)[0]
            elif kind == b"K":
                told["linkpath"] = body.split(b"\0", 1)[0]
            elif kind == b"x":
                told |= _pax(body)

    def _block(self) -> bytes | None:
        """The next header, or None at the end: two blocks of zeros, or the end of the stream at a header's place."""
        if self._at == len(self._buffer):
            chunk = next(self._chunks, b"")
            if not chunk:
                return None
            self._buffer, self._at = chunk, 0
        block = self._take(BLOCK)
        if block == _ZEROS:
            return None
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 0x20:
            raise Corrupt("not a tar archive, or a corrupt one: a header's checksum is wrong")
        return block

    def _fill(self) -> None:
        chunk = next(self._chunks, b"")
        if not chunk:
            raise Corrupt("the archive is truncated")
        self._buffer, self._at = chunk, 0

    def _take(self, count: int) -> bytes:
        pieces = []
        while count:
            if self._at == len(self._buffer):
                self._fill()
            piece = self._buffer[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _skip(self, count: int) -> None:
        while count:
            if self._at == len(self._buffer):
                self._fill()
            step = min(count, len(self._buffer) - self._at)
            self._at += step
            count -= step


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


def _pax(body: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not digits.isdigit() or not space < end <= len(body) or body[end - 1] != 10 or not equals:
            raise Corrupt("the archive is corrupt: a malformed PAX record")
        found[key.decode("utf-8", "replace")] = value
        at = end
    return found


def _entry(block: bytes, told: dict[str, bytes]) -> Entry:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    name = told.get("path") or name
    kind = _KINDS.get(block[156:157])
    if kind is None or any(key.startswith("GNU.sparse.") for key in told):
        raise Unacceptable(
            f"archive member {shown(name.decode(errors='replace'))!r}: neither a file nor a directory nor a link"
        )
    if kind == FILE and name.endswith(b"/"):
        kind = DIRECTORY
    size = 0
    if kind == FILE:
        size = _decimal(told["size"]) if told.get("size") else _number(block[124:136])
        if not 0 <= size <= MAX_FILE_BYTES:
            raise Corrupt(f"archive member {shown(name.decode(errors='replace'))!r}: claims {size} bytes")
    link = ""
    if kind in (HARDLINK, SYMLINK):
        raw = told.get("linkpath") or block[157:257].split(b"\0", 1)[0]
        if not raw or len(raw) > MAX_NAME or b"\0" in raw:
            raise Unacceptable(f"archive member {shown(name.decode(errors='replace'))!r}: a link to nowhere")
        link = raw.decode("utf-8", "surrogateescape")
    return Entry(clean(name), kind, size, link)


def _number(raw: bytes) -> int:
    """An octal field, or GNU's base-256 one (first bit set)."""
    if raw[0] & 0x80:
        return int.from_bytes(raw, "big") - (1 << (len(raw) * 8 - 1))
    digits = raw.strip(b" \0").split(b"\0", 1)[0]
    if digits.strip(b"01234567"):
        raise Corrupt("not a tar archive, or a corrupt one: a header's number isn't one")
    return int(digits or b"0", 8)


def _decimal(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 20:
        raise Corrupt("the archive is corrupt: a PAX record's number isn't one")
    return int(raw)
