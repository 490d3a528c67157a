"""A fast reader of tar streams: ustar, GNU long names and links, PAX (POSIX.1-2017, pax, "ustar Interchange Format").

    for entry in TarReader(chunks):
        for piece in entry_data: …

Names and links are bytes, exactly as the archive has them: nothing here trusts them. Checksums are verified, headers
bounded, and a stream that ends early is DATA_LOSS. Global PAX headers are read over, as containerd does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from shoal_bus.archive.errors import Corrupt, Unacceptable, shown

BLOCK = 512
REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (b"0", b"1", b"2", b"3", b"4", b"5", b"6")
MAX_HEADER_BYTES = 1 << 20
"""Of all PAX headers and GNU long names before one member."""
MAX_TRAILER_BYTES = 1 << 26
"""What may follow the end of an archive: padding, and nothing that is of any use."""
MAX_FILE_BYTES = 1 << 43
MAX_PATH_BYTES = 1 << 16
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
XATTR = b"SCHILY.xattr."

_ZEROS = bytes(BLOCK)
_OCTAL = b"01234567"
_HEADER_ONLY = frozenset((HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO))
_KINDS = _HEADER_ONLY | {REGULAR}


@dataclass(slots=True)
class Entry:
    """One member of an archive. Times are nanoseconds since 1970; `mode` has the permission bits, with setuid & co."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    atime: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


class TarReader:
    """The entries of a tar stream that comes in chunks. The data of an entry is read before the next one is asked for,
    or passed over."""

    def __init__(self, chunks: Iterator[bytes], *, most_extended: int = MAX_HEADER_BYTES) -> None:
        """`most_extended` bytes of extended headers may come before one member."""
        self._chunks, self._most_extended = chunks, most_extended
        self._buffer, self._at = b"", 0
        self._unread = 0
        """Bytes of the current entry's data that haven't been read."""
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        extended: dict[bytes, bytes] = {}
        long_name = long_link = None
        extended_bytes = 0
        while True:
            self._skip(self._unread + self._padding)
            self._unread = self._padding = 0
            block = self._block()
            if block is None:
                if extended or long_name is not None or long_link is not None:
                    raise Corrupt("the archive ends after an extended header")
                return
            kind = block[156:157]
            if kind in (b"x", b"X", b"g", b"L", b"K"):
                body = self._extended(_number(block[124:136]))
                extended_bytes += len(body)
                if extended_bytes > self._most_extended:
                    raise Corrupt(f"the archive is corrupt: more than {self._most_extended} bytes of extended headers")
                if kind == b"L":
                    long_name = body.split(b"\0", 1)[0]
                elif kind == b"K":
                    long_link = body.split(b"\0", 1)[0]
                elif kind != b"g":
                    extended.update(parse_pax(body))
                continue
            extended_bytes = 0
            entry = _entry(block, kind)
            if long_name is not None:
                entry.name, long_name = long_name, None
            if long_link is not None:
                entry.link, long_link = long_link, None
            if extended:
                _extend(entry, extended)
                extended = {}
            _check(entry)
            self._unread = entry.size
            self._padding = -entry.size % BLOCK
            yield entry

    def data(self) -> Iterator[memoryview]:
        """The current entry's bytes, in pieces that are good until the next one."""
        while self._unread:
            if self._at == len(self._buffer):
                self._fill()
            piece = memoryview(self._buffer)[self._at : self._at + self._unread]
            self._at += len(piece)
            self._unread -= len(piece)
            yield piece

    def drain(self) -> None:
        """Reads to the stream's end: what follows an archive counts for its digest."""
        trailer = 0
        for chunk in self._chunks:
            trailer += len(chunk)
            if trailer > MAX_TRAILER_BYTES:
                raise Unacceptable(f"the archive is followed by more than {MAX_TRAILER_BYTES} bytes")

    def _fill(self) -> None:
        chunk = next(self._chunks, b"")
        if not chunk:
            raise Corrupt("the archive is truncated")
        self._buffer, self._at = chunk, 0

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end <= len(self._buffer):
            taken = self._buffer[self._at : end]
            self._at = end
            return taken
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

    def _block(self) -> bytes | None:
        """The next header, or None at the end: two blocks of zeros, or the end of the stream at a header's place."""
        if self._at == len(self._buffer):
            chunk = next(self._chunks, b"")
            if not chunk:
                return None
            self._buffer, self._at = chunk, 0
        block = self._take(BLOCK)
        if block == _ZEROS:
            if self._at == len(self._buffer):
                chunk = next(self._chunks, b"")
                if not chunk:
                    return None
                self._buffer, self._at = chunk, 0
            if self._take(BLOCK) != _ZEROS:
                raise Corrupt("the archive is corrupt: a lone block of zeros")
            return None
        told = _number(block[148:156])
        total = sum(block) - sum(block[148:156]) + 256
        if told != total:
            # Some old writers summed signed characters.
            signed = total - 256 * sum(1 for b in block[:148] + block[156:] if b > 127)
            if told != signed:
                raise Corrupt("not a tar archive, or a corrupt one: a header's checksum is wrong")
        return block

    def _extended(self, size: int) -> bytes:
        if not 0 <= size <= self._most_extended:
            raise Corrupt(f"the archive is corrupt: an extended header of {size} bytes")
        body = self._take(size)
        self._skip(-size % BLOCK)
        return body


def parse_pax(body: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header: `<length> <key>=<value>\\n`, where the length counts itself."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if (
            not digits.isdigit()
            or not space < end <= len(body)
            or body[end - 1] != 10
            or not equals
            or not key
            or 0 in key
        ):
            raise Corrupt("the archive is corrupt: a malformed PAX record")
        records[key] = value
        at = end
    return records


def _entry(block: bytes, kind: bytes) -> Entry:
    name = block[:100].split(b"\0", 1)[0]
    magic = block[257:263]
    if magic == b"ustar\0":
        prefix = (block[345:476] if block[508:512] == b"tar\0" else block[345:500]).split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    if kind in (b"\0", b"7", b"0"):
        kind = DIRECTORY if kind == b"\0" and name.endswith(b"/") else REGULAR
    elif kind == b"S":
        raise _sparse(name)
    elif kind not in _KINDS:
        raise Unacceptable(f"{shown(name)}: unknown type of archive member {kind!r}")
    mtime = _number(block[136:148]) * 1_000_000_000
    device = kind in (CHARACTER, BLOCK_DEVICE)
    return Entry(
        name=name,
        kind=kind,
        mode=_number(block[100:108]) & 0o7777,
        uid=_number(block[108:116]),
        gid=_number(block[116:124]),
        size=0 if kind in _HEADER_ONLY else _number(block[124:136]),
        mtime=mtime,
        atime=mtime,
        link=block[157:257].split(b"\0", 1)[0] if kind in (HARDLINK, SYMLINK) else b"",
        major=_number(block[329:337]) if device else 0,
        minor=_number(block[337:345]) if device else 0,
    )


def _extend(entry: Entry, records: dict[bytes, bytes]) -> None:
    """Applies PAX records; one with an empty value takes nothing away that the plain header said."""
    for key, value in records.items():
        if key.startswith(XATTR):
            entry.xattrs[key[len(XATTR) :].decode("utf-8", "surrogateescape")] = value
        elif key.startswith(b"GNU.sparse."):
            raise _sparse(entry.name)
        elif not value:
            continue
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value if entry.kind in (HARDLINK, SYMLINK) else b""
        elif key == b"size":
            entry.size = 0 if entry.kind in _HEADER_ONLY else _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.mtime = _nanoseconds(value)
            entry.atime = max(entry.atime, entry.mtime) if b"atime" in records else entry.mtime
        elif key == b"atime":
            entry.atime = max(_nanoseconds(value), entry.mtime)


def _check(entry: Entry) -> None:
    if not 0 <= entry.size <= MAX_FILE_BYTES:
        raise Corrupt(f"{shown(entry.name)}: claims {entry.size} bytes")
    if not (0 <= entry.uid <= 0xFFFFFFFE and 0 <= entry.gid <= 0xFFFFFFFE):
        raise Unacceptable(f"{shown(entry.name)}: no such owner {entry.uid}:{entry.gid}")
    if not (0 <= entry.major <= MAX_MAJOR and 0 <= entry.minor <= MAX_MINOR):
        raise Unacceptable(f"{shown(entry.name)}: no such device {entry.major}:{entry.minor}")
    entry.mtime, entry.atime = _bounded(entry.mtime), _bounded(entry.atime)
    if b"\0" in entry.name or b"\0" in entry.link:
        raise Corrupt(f"{shown(entry.name)}: a name with a zero byte")
    if len(entry.name) > MAX_PATH_BYTES or len(entry.link) > MAX_PATH_BYTES:
        raise Unacceptable(f"{shown(entry.name)}: a name of {len(entry.name)} bytes")


def _bounded(time: int) -> int:
    """A time that every file system takes; as in containerd, one that is out of bounds is the beginning of 1970."""
    return time if 0 <= time < 1 << 63 else 0


def _sparse(name: bytes) -> Unacceptable:
    return Unacceptable(f"{shown(name)}: sparse archive members aren't supported", hint="make it without --sparse")


@lru_cache(2048)  # one archive's modes, owners and times are few
def _number(raw: bytes) -> int:
    """An octal field, or GNU's base-256 one (first bit set; two's complement)."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big")
        bits = len(raw) * 8 - 1
        value -= 1 << bits
        return value - (1 << bits) if value >> (bits - 1) else value
    digits = raw.strip(b" \0").split(b"\0", 1)[0].rstrip(b" ")
    if not digits:
        return 0
    if digits.translate(None, _OCTAL):  # `int` would take signs, prefixes and underscores
        raise Corrupt("not a tar archive, or a corrupt one: a header's number isn't one")
    return int(digits, 8)


def _decimal(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 20:
        raise Corrupt("the archive is corrupt: a PAX record's number isn't one")
    return int(raw)


def _nanoseconds(raw: bytes) -> int:
    sign = -1 if raw.startswith(b"-") else 1
    seconds, _, fraction = raw.lstrip(b"-").partition(b".")
    if not seconds.isdigit() or len(seconds) > 18 or (fraction and not fraction.isdigit()):
        raise Corrupt("the archive is corrupt: a PAX record's time isn't one")
    return sign * (int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0")))
