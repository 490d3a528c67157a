"""Writes tar as layers have it: ustar headers (POSIX.1-2017, pax), with PAX records only where ustar can't say it.

The same entries make the same bytes: no names of users, no access or change times, no order but the caller's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping

from shoal_bus.archive.tar import BLOCK, BLOCK_DEVICE, CHARACTER, DIRECTORY, FIFO, HARDLINK, REGULAR, SYMLINK, XATTR

_PAX = b"x"
_NAME_BYTES = 100
_MAX_OCTAL_7, _MAX_OCTAL_11 = 8**7 - 1, 8**11 - 1
_SECOND = 1_000_000_000
_ZEROS = bytes(1 << 16)
_KINDS = {
    stat.S_IFREG: REGULAR, stat.S_IFLNK: SYMLINK, stat.S_IFCHR: CHARACTER, stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFDIR: DIRECTORY, stat.S_IFIFO: FIFO,
}  # fmt: skip


class Archive:
    """A tar stream that goes to `write`. `newest` (nanoseconds since 1970) is the latest time any entry has."""

    def __init__(self, write: Callable[[bytes | memoryview], None], newest: int | None = None) -> None:
        self._write, self._newest = write, newest
        self.entries = 0
        self._left = 0
        self._padding = 0

    def add(
        self, path: bytes, status: os.stat_result, owner: tuple[int, int], *, link: bytes = b"",
        hardlink: bool = False, xattrs: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        """The header of a file with these attributes; `link` is what a symbolic or hard link leads to.

        As many bytes of `data` as the file has must follow a regular one that is no hard link.
        """
        kind = HARDLINK if hardlink else _KINDS[stat.S_IFMT(status.st_mode)]
        size = status.st_size if kind == REGULAR else 0
        device = status.st_rdev if kind in (CHARACTER, BLOCK_DEVICE) else 0
        self._header(
            path + b"/" if kind == DIRECTORY else path, kind, stat.S_IMODE(status.st_mode), owner, size,
            status.st_mtime_ns, link, device, xattrs or {},
        )  # fmt: skip
        self._left, self._padding = size, -size % BLOCK

    def remove(self, path: bytes) -> None:
        """A whiteout: what lower layers have at `path` is gone."""
        directory, slash, name = path.rpartition(b"/")
        self._header(directory + slash + b".wh." + name, REGULAR, 0, (0, 0), 0, self._newest or 0, b"", 0, {})

    def data(self, piece: bytes | memoryview) -> None:
        """Bytes of the file whose header was last."""
        self._left -= len(piece)
        self._write(piece)
        self._pad()

    def zeros(self, count: int) -> None:
        """So many zeros of the file whose header was last."""
        self._left -= count
        while count:
            step = min(count, len(_ZEROS))
            self._write(_ZEROS[:step])
            count -= step
        self._pad()

    def finish(self) -> None:
        """The end of the archive."""
        self._write(bytes(2 * BLOCK))

    def _pad(self) -> None:
        if not self._left and self._padding:
            self._write(bytes(self._padding))
            self._padding = 0

    def _header(
        self, path: bytes, kind: bytes, mode: int, owner: tuple[int, int], size: int, mtime: int, link: bytes,
        device: int, xattrs: Mapping[str, bytes],
    ) -> None:  # fmt: skip
        if self._newest is not None:
            mtime = min(mtime, self._newest)
        records: dict[bytes, bytes] = {}
        if len(path) > _NAME_BYTES:
            records[b"path"] = path
        if len(link) > _NAME_BYTES:
            records[b"linkpath"] = link
        uid, gid = owner
        if uid > _MAX_OCTAL_7:
            records[b"uid"] = b"%d" % uid
        if gid > _MAX_OCTAL_7:
            records[b"gid"] = b"%d" % gid
        if size > _MAX_OCTAL_11:
            records[b"size"] = b"%d" % size
        seconds, fraction = divmod(mtime, _SECOND)
        if fraction or not 0 <= seconds <= _MAX_OCTAL_11:
            records[b"mtime"] = _decimal(mtime)
        for key in sorted(xattrs):
            records[XATTR + os.fsencode(key)] = xattrs[key]
        if records:
            body = b"".join(_record(key, records[key]) for key in sorted(records))
            name = (b"PaxHeaders.0/" + path.rstrip(b"/").rpartition(b"/")[2])[:_NAME_BYTES]
            self._write(_block(name, _PAX, 0o644, 0, 0, len(body), 0, b"", 0))
            self._write(body + bytes(-len(body) % BLOCK))
        self._write(
            _block(
                path[:_NAME_BYTES],
                kind,
                mode,
                _fits(uid, _MAX_OCTAL_7),
                _fits(gid, _MAX_OCTAL_7),
                _fits(size, _MAX_OCTAL_11),
                _fits(seconds, _MAX_OCTAL_11),
                link[:_NAME_BYTES],
                device,
            )
        )
        self.entries += 1


def _block(
    name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes, device: int
) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, uid, gid, size, mtime)
    tail = b"%s%s%s%s%s%07o\0%07o\0%s" % (
        kind, link.ljust(100, b"\0"), b"ustar\x0000", bytes(32), bytes(32), os.major(device), os.minor(device),
        bytes(167),
    )  # fmt: skip
    return head + b"%06o\0 " % (sum(head) + sum(tail) + 8 * 32) + tail


def _fits(value: int, largest: int) -> int:
    """What stands in a field when a PAX record says more than it holds."""
    return value if 0 <= value <= largest else 0


def _record(key: bytes, value: bytes) -> bytes:
    """A PAX record: its length counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def _decimal(nanoseconds: int) -> bytes:
    seconds, fraction = divmod(abs(nanoseconds), _SECOND)
    text = (b"%d.%09d" % (seconds, fraction)).rstrip(b"0").rstrip(b".")
    return (b"-" if nanoseconds < 0 else b"") + text
