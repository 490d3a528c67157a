"""How the runtime service, the zygote and the shims talk: JSON in frames on a Unix stream socket.

A frame is its length (four bytes, big-endian) and a JSON map. A request has `op` and `n`; its reply has the same
`n`, and `error` (`code`, `message`, `hint`) where it failed. What a shim says unasked has `event`. On any connection
it begins with `{"event": "hello", "version": …, "namespace": …, "id": …}` and the events of what has happened
already: whoever connects late misses nothing. `exit` tells of an exec where it has `exec`, of the first process
otherwise; `oom` has the number of OOM kills so far.

Versions: a shim from before an upgrade goes on being managed, so operations are only ever added, and a shim answers an
unknown one with UNIMPLEMENTED.
"""

from __future__ import annotations

import _socket
import os
import struct

from shoal_runtime.shim import codec, files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
MAX_FRAME = 16 << 20
_LENGTH = struct.Struct(">I")

SOCKET, RECORD, INIT, EXIT = "sock", "shim.json", "init.json", "exit.json"
"""The names in a container's directory: its socket, what it is, its first process, and how that ended."""
LAST_WORD = "last-word.json"
"""Why a shim ended that could not go on."""
EXEC, GROUP = "exec-", ".group"
"""What the record of an exec begins with (its pid, and then how it ended), and the directory of a group ends with."""

ZYGOTE_SOCKET, SHIM_SOCKET, ZYGOTE_LOCK = "zygote.sock", "new.sock", "zygote.lock"
"""Where to connect as long as the zygote is wanted; where each connection is a new shim's; the zygote's own lock."""


class ShimError(Exception):
    """What a shim or the zygote refuses, with a canonical code."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    def to_wire(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


def encode(message: dict[str, Any]) -> bytes:
    """A message as one frame."""
    data = codec.dumps(message)
    return _LENGTH.pack(len(data)) + data


class Decoder:
    """Frames out of a byte stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def empty(self) -> bool:
        """No part of a frame waits for its rest."""
        return not self._buffer

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The whole messages there are now. ValueError when the stream isn't made of frames."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(codec.loads(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return messages


def listen(directory: str, name: str) -> _socket.socket:
    """A listening socket `name` in `directory`, root's alone. The path may be longer than `sun_path` holds."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.umask(before)
        listener.listen(128)
        listener.setblocking(False)
        return listener
    finally:
        os.close(fd)


def accept(listener: _socket.socket) -> _socket.socket:
    """The next connection. BlockingIOError where there is none, ConnectionAbortedError when it has gone already."""
    return _socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]


def connect(directory: str, name: str) -> _socket.socket:
    """A connection to the socket `name` in `directory`. OSError when nobody listens there."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{fd}/{name}")
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(fd)


def write(directory: str, name: str, content: dict[str, Any], *, sync: bool = False) -> None:
    """Writes a small JSON file so that it is there whole, or not at all, whoever is killed."""
    beside = f"{directory}/.{name}.{os.getpid()}"
    files.write(beside, codec.dumps(content), sync=sync)
    os.rename(beside, f"{directory}/{name}")


def write_durably(directory: str, name: str, content: dict[str, Any]) -> None:
    """`write`, and on disk when it returns."""
    write(directory, name, content, sync=True)
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def read_json(directory: str, name: str) -> dict[str, Any] | None:
    """The map a file holds, or None when it isn't there."""
    try:
        loaded: dict[str, Any] = codec.loads(files.read(f"{directory}/{name}"))
        return loaded
    except FileNotFoundError:
        return None


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot: with its pid, what tells it from a later one; empty if gone.

    A zombie is gone: nobody can harm or help it any more. (proc(5), /proc/pid/stat, fields 3 and 22.)
    """
    try:
        fields = files.read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
