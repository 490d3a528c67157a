"""The caller's side: hands a command over to the node, passes signals on, and exits as the command does.

It loads nothing but built-in modules: what it takes is what every command takes.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys

from shoal_cli.commandserver import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_STATE = "/run/shoal"
OWN_PROCESS = ("up", "containerd")
"""Commands that are the node: they live as long as it, in a process that is theirs."""
OFF = "SHOAL_NO_COMMAND_SERVER"
"""Set to anything, it has every command run in the process that was called."""
KILLED = 137
"""The exit code for a command that died of nothing that was sent through us."""
PASSED_ON = (
    _signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2,
    _signal.SIGALRM, _signal.SIGWINCH,
)  # fmt: skip


def hand_over(arguments: list[str]) -> int | None:
    """The exit code of the command, run by the node on this machine; None where it has to be run here."""
    if not _may_be_handed_over(arguments):
        return None
    try:
        sock = protocol.connect(os.environ.get("SHOAL_STATE") or DEFAULT_STATE)
    except OSError:
        return None  # there is no node here
    try:
        command = _ask(sock, arguments)
        if command is None:
            return None
        return _wait(sock, command)
    finally:
        sock.close()


def _may_be_handed_over(arguments: list[str]) -> bool:
    if os.geteuid() != 0 or not arguments or arguments[0].startswith("-") or arguments[0] in OWN_PROCESS:
        return False
    if OFF in os.environ or "_SHOAL_COMPLETE" in os.environ:
        return False
    # The kernel keeps who isn't in the foreground from reading a terminal, but only those whose terminal it is: not a
    # command in the node's session. It could come to be in the background only where Ctrl-Z is a signal.
    if os.isatty(0):
        try:
            if os.tcgetpgrp(0) != os.getpgrp():
                return False
        except OSError:
            return False  # it is a terminal, and not ours
        return not _reads_lines(arguments)
    return True


def _reads_lines(arguments: list[str]) -> bool:
    """Whether these may ask for standard input without a terminal's raw mode."""
    short = "".join(word for word in arguments if word[:1] == "-" and word[1:2] != "-")
    reads = "i" in short or "--interactive" in arguments or "-" in arguments or arguments[0] == "attach"
    return reads and not ("t" in short or "--tty" in arguments)


def _ask(sock: _socket.socket, arguments: list[str]) -> int | None:
    """A pidfd of the command that was begun for us; None where it wasn't."""
    try:
        if protocol.peer(sock)[1] != 0:
            return None
        directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            request = protocol.encode(protocol.identity(), arguments, dict(os.environb))
            fds = [*range(protocol.STREAMS), directory]
            protocol.send_fds(sock, protocol.LENGTH.pack(len(request)), fds)
        finally:
            os.close(directory)
        sock.sendall(request)
        answer, given = protocol.receive_fds(sock, 1, 1)
    except OSError:
        return None
    return given[0] if answer == protocol.ACCEPTED and given else None


def _wait(sock: _socket.socket, command: int) -> int:
    """Passes signals on to the command until it ends; its exit code. Dies as it did, where a signal ended it."""
    last = 0

    def pass_on(number: int, _: Any) -> None:
        nonlocal last
        last = number
        _send(command, number)

    def stop(number: int, _: Any) -> None:
        _send(command, _signal.SIGSTOP)
        _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)  # here we are until somebody has us go on
        _signal.signal(number, stop)
        _send(command, _signal.SIGCONT)

    for number in PASSED_ON:
        _signal.signal(number, pass_on)
    _signal.signal(_signal.SIGTSTP, stop)
    try:
        code = sock.recv(1)
    except OSError:
        code = b""
    if code:
        return code[0]
    if last:
        _signal.signal(last, _signal.SIG_DFL)
        os.kill(os.getpid(), last)
    sys.stderr.write("shoal: the command was killed\n")
    return KILLED


def _send(command: int, number: int) -> None:
    try:
        _signal.pidfd_send_signal(command, number)
    except ProcessLookupError:
        pass  # it has just ended
