"""Commands that the node's process runs for who calls them: as if they ran where they were called."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import shoal_cli
from shoal_cli.commandserver import protocol
from shoal_cli.commandserver.client import OFF

from tests.e2e.shoal import COMMAND, Shoal, eventually, unique
from tests.e2e.terminal import Terminal
from tests.support.leaks import lives

PIDS = next(path for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if (path / "cgroup.procs").exists())
ALONE = {OFF: "1"}


def children(node: Shoal) -> list[tuple[psutil.Process, str, str]]:
    """Those of the node's process, each with its name and its state."""
    found = []
    for child in psutil.Process(node.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found.append((child, child.name(), child.status()))
    return found


def running(node: Shoal) -> list[psutil.Process]:
    """The commands that the node's process runs."""
    return [child for child, name, _ in children(node) if name == "shoal"]


@pytest.fixture(autouse=True)
def nothing_runs_on(node: Shoal) -> Iterator[None]:
    before = {child.pid for child, _, _ in children(node)}
    yield
    eventually(lambda: {child.pid for child, _, _ in children(node)} <= before, 10)


@pytest.fixture
def follower(node: Shoal) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A caller that waits for events, and the command that does so for it."""
    caller = node.spawn("events", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    [command] = eventually(lambda: running(node))
    yield caller, command
    caller.kill()
    caller.communicate()


@pytest.mark.parametrize(
    "arguments", [["ps"], ["ps", "--json"], ["run", "x:y", "z"], ["nonsense"], ["rm"], ["ps", "-h"]]
)
def test_what_it_says_is_the_same_either_way(node: Shoal, arguments: list[str]) -> None:
    handed_over, here = node.run(*arguments), node.run(*arguments, **ALONE)
    assert (handed_over.returncode, handed_over.stdout, handed_over.stderr) == (
        here.returncode, here.stdout, here.stderr,
    )  # fmt: skip


def test_its_environment_is_the_caller_s(node: Shoal, image: str) -> None:
    done = node.run("run", "--rm", "-e", "GIVEN", image, "sh", "-c", "echo $GIVEN", GIVEN="by its caller")
    assert (done.returncode, done.stdout, done.stderr) == (0, "by its caller\n", "")


def test_streams_are_the_caller_s_own(node: Shoal, image: str) -> None:
    lines = ["run", "--rm", "-i", image, "sh", "-c", "wc -c; echo wrong >&2; exit 41"]
    done = node.run(*lines, stdin=b"x" * 1_000_000)
    assert (done.returncode, done.stdout, done.stderr) == (41, "1000000\n", "wrong\n")


def test_who_stops_reading_ends_it_quietly(node: Shoal) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(COMMAND)} ps --help | head -c 1; echo"],
        env=node.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_to_the_caller_is_one_to_the_command(node: Shoal, number: signal.Signals) -> None:
    ends = []
    for environment in ({}, ALONE):
        caller = subprocess.Popen(
            [*COMMAND, "events", "--follow"], env=node.environment | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(1.5)  # it is loaded, and listens
        caller.send_signal(number)
        ends.append((*caller.communicate(timeout=20), caller.returncode))
    assert ends[0] == ends[1]


def test_the_command_dies_with_its_caller(follower: tuple[subprocess.Popen[bytes], psutil.Process]) -> None:
    caller, command = follower
    caller.kill()
    caller.communicate()
    eventually(lambda: not lives(command.pid), 5)


def test_the_caller_ends_with_its_command(follower: tuple[subprocess.Popen[bytes], psutil.Process]) -> None:
    caller, command = follower
    command.kill()
    assert caller.communicate(timeout=20) == (b"", b"shoal: the command was killed\n")
    assert caller.returncode == 137


def test_a_stopped_caller_stops_its_command(node: Shoal) -> None:
    # As a job of a shell's: the kernel stops nobody who has no one to have it go on (an orphaned process group).
    caller = node.spawn("events", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
    try:
        [command] = eventually(lambda: running(node))
        caller.send_signal(signal.SIGTSTP)
        eventually(lambda: command.status() == psutil.STATUS_STOPPED)
        assert psutil.Process(caller.pid).status() == psutil.STATUS_STOPPED
        caller.send_signal(signal.SIGCONT)
        eventually(lambda: command.status() != psutil.STATUS_STOPPED)
        caller.send_signal(signal.SIGINT)
        assert caller.wait(20) == 130
    finally:
        caller.kill()
        caller.wait()


def test_a_command_outlives_the_node_that_began_it(tmp_path: Path, image: str, busybox: str) -> None:
    with Shoal(tmp_path, node="outlived") as node:
        node.up()
        node.ok("pull", busybox)
        id = unique("outlives")
        caller = node.spawn(
            "run", "--rm", "-i", "--name", id, busybox, "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert caller.stdin is not None
        assert caller.stdout is not None
        caller.stdin.write(b"one\n")
        caller.stdin.flush()
        assert caller.stdout.readline() == b"one\n"
        [command] = running(node)
        node.kill()
        assert command.is_running()
        node.up()
        assert running(node) == []
        output, _ = caller.communicate(b"two\n", timeout=60)
        assert (caller.returncode, output) == (0, b"two\n")


def test_it_has_what_its_caller_was_given(node: Shoal, tmp_path: Path) -> None:
    def prepare() -> None:
        os.nice(3)
        os.umask(0o27)
        os.setgroups([7, 8])
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, 200))
        Path("/proc/self/oom_score_adj").write_text("500")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    caller = subprocess.Popen(
        [*COMMAND, "events"],
        env=node.environment,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
        preexec_fn=prepare,  # noqa: PLW1509 (no threads are at work)
    )
    try:
        [command] = eventually(lambda: running(node))
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{command.pid}/status").read_text().splitlines()
            if "\t" in line
        )
        assert (command.nice(), command.cwd(), status["Umask"], status["Groups"].split()) == (
            psutil.Process().nice() + 3, str(tmp_path), "0027", ["7", "8"],
        )  # fmt: skip
        assert command.rlimit(resource.RLIMIT_NOFILE) == (99, 200)
        assert Path(f"/proc/{command.pid}/oom_score_adj").read_text() == "500\n"
        assert command.num_fds() < 12, "nothing of the node's is open in it"
    finally:
        caller.kill()
        caller.wait()


def test_it_is_in_its_caller_s_cgroup(node: Shoal) -> None:
    name = unique("shoal-caller")
    place = PIDS / name
    place.mkdir()
    caller = subprocess.Popen(
        ["sh", "-c", f"echo $$ >{place}/cgroup.procs; exec {' '.join(COMMAND)} events"],
        env=node.environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        [command] = eventually(lambda: running(node))
        assert str(command.pid) in (place / "cgroup.procs").read_text().split()
    finally:
        caller.kill()
        caller.wait()
        eventually(lambda: not (place / "cgroup.procs").read_text())
        place.rmdir()


def others() -> Iterator[tuple[str, list[str]]]:
    for kind in ("--net", "--mount", "--uts", "--ipc", "--cgroup"):
        yield kind, ["unshare", kind]
    yield "capabilities", ["setpriv", "--bounding-set", "-sys_boot", "--inh-caps", "-all"]
    yield "new privileges", ["setpriv", "--no-new-privs"]


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in others()])
def test_who_is_somewhere_else_runs_it_there(node: Shoal, words: list[str]) -> None:
    caller = subprocess.Popen(
        [*words, *COMMAND, "events"], env=node.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        own = psutil.Process(caller.pid)
        eventually(lambda: any("shoal_bus" in map_.path or "pydantic" in map_.path for map_ in own.memory_maps()))
        assert running(node) == []
    finally:
        caller.kill()
        caller.wait()


def test_who_is_in_the_background_of_a_terminal_runs_it_there(node: Shoal) -> None:
    line = f"set -m; {' '.join(COMMAND)} events & echo begun; wait"
    with Terminal(node, "-c", line, command=["sh"]) as terminal:
        terminal.until(b"begun")
        time.sleep(1.5)
        assert running(node) == []
        [background] = psutil.Process(terminal.process.pid).children()
        background.kill()
        terminal.ends()


def test_an_upgrade_s_commands_are_run_by_its_own_code(node: Shoal) -> None:
    file = Path(shoal_cli.__file__)
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    try:
        caller = node.spawn("events", stdout=subprocess.DEVNULL)
        time.sleep(2)
        assert running(node) == []
        caller.kill()
        caller.wait()
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "half a length": lambda: b"\0\0",
    "no bytes": lambda: struct.pack(">I", 0),
    "too much": lambda: struct.pack(">I", 0xFFFFFFFF),
    "no number": lambda: struct.pack(">I", 6) + b"a\0b\0c\0",
    "fewer arguments": lambda: struct.pack(">I", 6) + b"a\x009\0c\0",
    "a negative number": lambda: struct.pack(">I", 7) + b"a\0-9\0c\0",
    "less than it says": lambda: struct.pack(">I", 100) + b"a\x000\0",
}


@pytest.mark.parametrize("fds", [0, 3, 4, 50])
@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_request_is_refused(node: Shoal, what: str, fds: int) -> None:
    data = HOSTILE[what]()
    with socket.socket(fileno=protocol.connect(str(node.state)).detach()) as sock, Path(os.devnull).open() as null:
        if data and fds:
            socket.send_fds(sock, [data], [null.fileno()] * fds)
        else:
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(10)
        assert sock.recv(1) in (b"R", b"")


def test_who_is_not_root_gets_nothing(node: Shoal) -> None:
    script = "import os,socket,sys; s=socket.socket(fileno=int(sys.argv[1])); os.setuid(65534); s.connect(sys.argv[2])"
    with socket.socket(socket.AF_UNIX) as sock:
        done = subprocess.run(
            [sys.executable, "-c", script, str(sock.fileno()), f"/proc/self/cwd/{protocol.SOCKET}"],
            pass_fds=[sock.fileno()], cwd=node.state, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "PermissionError" in done.stderr
