"""What a caller and a command say to one another, on a Unix stream socket.

The caller sends, once: a length (four bytes, big-endian), and as many bytes: the identity of its code, the number of
its arguments, the arguments, and its environment as `name=value`, each ended by NUL. With the length come descriptors
(SCM_RIGHTS): standard input, output and error, and the working directory.

The answer is one byte, `REFUSED` or, with a pidfd of the command, `ACCEPTED`; then, at its end, its exit code in one.
"""

from __future__ import annotations

import _socket
import os
import struct
import sys

SOCKET = "commands.sock"
"""Its name in a node's state directory."""
REFUSED, ACCEPTED = b"R", b"A"
LENGTH = struct.Struct(">I")
MAX_REQUEST = 16 << 20
"""The kernel takes no more from execve(2) on any machine."""
STREAMS = 3
FDS = STREAMS + 1

_END = b"\0"


def identity() -> str:
    """Which code this is, and how it reads and writes text: a command is the same only where these are."""
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    parts = [sys.executable, package, sys.version, sys.getfilesystemencoding()]
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        parts += [stream.encoding, stream.errors or ""]
    return "\n".join(parts)


def encode(identity: str, arguments: list[str], environment: dict[bytes, bytes]) -> bytes:
    """A request, without its length."""
    words = [os.fsencode(identity), str(len(arguments)).encode(), *map(os.fsencode, arguments)]
    words += [name + b"=" + value for name, value in environment.items()]
    return _END.join(words) + _END


def decode(data: bytes) -> tuple[str, list[str], dict[bytes, bytes]]:
    """The parts of a request. ValueError where it isn't one."""
    identity, count, *words = data.split(_END)[:-1]
    arguments, environment = words[: int(count)], words[int(count) :]
    if len(arguments) != int(count):
        raise ValueError("arguments are missing")
    pairs = (entry.partition(b"=") for entry in environment)
    return os.fsdecode(identity), [os.fsdecode(word) for word in arguments], {name: value for name, _, value in pairs}


def peer(sock: _socket.socket) -> tuple[int, int]:
    """Process and user id of whoever is at the other end (unix(7), SO_PEERCRED)."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    return pid, uid


def receive(sock: _socket.socket, size: int) -> bytes:
    """So many bytes. EOFError where it ends before."""
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def receive_fds(sock: _socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """So many bytes at the most, and the descriptors that came with them."""
    data, ancillary, _, _ = sock.recvmsg(
        size, _socket.CMSG_SPACE(most * struct.calcsize("i")), _socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, rights in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) // 4 * 4])
    return data, fds


def send_fds(sock: _socket.socket, data: bytes, fds: list[int]) -> None:
    """Sends a few bytes, and descriptors with them."""
    sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])


def connect(directory: str) -> _socket.socket:
    """A connection to the node of a state directory. OSError where there is none. (`sun_path` holds no long paths.)"""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{fd}/{SOCKET}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(fd)


def listen(directory: str) -> _socket.socket:
    """Takes connections in a state directory, of root alone, from then on; whatever listened there before is gone."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{fd}/{SOCKET}"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(128)
        listener.setblocking(False)
        return listener
    finally:
        os.close(fd)
