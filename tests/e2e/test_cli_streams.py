"""What goes through `shoal run` and `shoal attach` without a terminal: pipes, files, sockets, and what is missing."""

from __future__ import annotations

import array
import fcntl
import hashlib
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.shoal import COMMAND, Shoal, eventually, refused, unique

pytestmark = pytest.mark.usefixtures("in_either_process")

MUCH = 100 << 20


def digest(read: Callable[[int], bytes]) -> tuple[int, str]:
    """How many bytes come to the end, and their digest."""
    count, found = 0, hashlib.sha256()
    while data := read(1 << 20):
        count += len(data)
        found.update(data)
    return count, found.hexdigest()


def unread(pipe: Any) -> int:
    """How many bytes wait in a pipe (pipe(7), FIONREAD)."""
    found = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


def ended_by(process: subprocess.Popen[bytes], number: signal.Signals, *, times: int = 1) -> int:
    """The exit status of a process that ends for so many of a signal in a row; a slow machine may need some more."""
    for _ in range(5):
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(6)
    raise AssertionError(f"it goes on in spite of {number.name}")


def in_shell(node: Shoal, script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A shell's script in which `$@` is a `shoal` command."""
    return subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, *arguments], env=node.environment, stdin=subprocess.DEVNULL,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_hundred_megabytes_come_to_the_last_byte(node: Shoal, image: str, tmp_path: Path) -> None:
    command = ["run", "--rm", image, "sh", "-c", f"head -c {MUCH} /dev/zero; echo end; exit 6"]
    expected = hashlib.sha256(b"\0" * MUCH + b"end\n").hexdigest()
    running = node.spawn(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert digest(running.stdout.read) == (MUCH + 4, expected)
    assert running.wait(30) == 6
    with (tmp_path / "out").open("wb") as file:
        assert node.spawn(*command, stdin=subprocess.DEVNULL, stdout=file).wait(60) == 6
    with (tmp_path / "out").open("rb") as file:
        assert digest(file.read) == (MUCH + 4, expected)


def test_a_hundred_megabytes_go_in_and_come_out(node: Shoal, box: str, tmp_path: Path) -> None:
    with (tmp_path / "in").open("wb") as file:
        file.truncate(MUCH)
    with (tmp_path / "in").open("rb") as file:
        running = node.spawn("exec", "-i", box, "cat", stdin=file, stdout=subprocess.PIPE)
        assert running.stdout is not None
        assert digest(running.stdout.read) == (MUCH, hashlib.sha256(b"\0" * MUCH).hexdigest())
        assert running.wait(30) == 0


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_slow_reader_gets_everything_and_signals_do_not_wait_for_him(node: Shoal, image: str, kind: str) -> None:
    script = "trap 'echo caught >&2' USR1; echo ready >&2; seq 1 200000; sleep 0.1; exit 3"
    ours, theirs = socket.socketpair()
    running = node.spawn(
        "run", "--rm", image, "sh", "-c", script, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if kind == "pipe" else theirs,
    )  # fmt: skip
    theirs.close()
    assert running.stderr is not None
    assert running.stderr.readline() == b"ready\n"
    read = running.stdout.read if running.stdout is not None else ours.recv
    begin = read(100_000)
    # Nobody reads; it is stuck in the middle of what it writes, and so are we.
    running.send_signal(signal.SIGUSR1)
    whole = begin
    while data := read(1 << 16):
        whole += data
    assert whole == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert running.stderr.read() == b"caught\n"
    assert running.wait(30) == 3
    ours.close()


def test_output_that_cannot_be_written_is_no_success(node: Shoal, image: str, box: str) -> None:
    done = in_shell(node, '"$@" >/dev/full', "run", "--rm", image, "sh", "-c", "echo lost; sleep 60")
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b"shoal: what came out could not be written: No space left on device\n"
    eventually(lambda: [one["id"] for one in node.json("ps", "--all")] == [box])


@pytest.mark.parametrize(
    ("closed", "out", "err"),
    [("<&-", b"out\n", b"err\n"), (">&-", b"", b"err\n"), ("2>&-", b"out\n", b""), ("<&- >&- 2>&-", b"", b"")],
)
def test_streams_that_are_missing_are_empty(node: Shoal, box: str, closed: str, out: bytes, err: bytes) -> None:
    done = in_shell(node, f'"$@" {closed}', "exec", "-i", box, "sh", "-c", "echo out; echo err >&2; cat; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, out, err)


def test_commands_without_any_stream_do_what_they_do(node: Shoal, box: str) -> None:
    assert in_shell(node, '"$@" <&- >&- 2>&-', "ps").returncode == 0
    assert in_shell(node, '"$@" <&- >&- 2>&-', "inspect", "nobody").returncode == 4


def test_a_container_with_input_is_attached_to_again_and_again(node: Shoal, image: str) -> None:
    id = unique("listening")
    script = "while read line; do echo got $line; echo err $line >&2; done; echo over; exit 6"
    node.ok("run", "-d", "-i", "--name", id, image, "sh", "-c", script)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def attach(*options: str) -> subprocess.Popen[bytes]:
        return node.spawn("attach", *options, id, **pipes)

    first = attach("--no-sig-proxy")
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(b"one\n")
    first.stdin.flush()
    assert first.stdout.readline() == b"got one\n"
    refused(node.run("attach", id), 7, "FAILED_PRECONDITION", "somebody else")
    first.send_signal(signal.SIGINT)
    assert first.wait(30) == 128 + signal.SIGINT  # before its input ends, which would be the container's end
    out, err = first.communicate()
    assert out == b""
    assert err == f"err one\nshoal: container {id} goes on; come back with `shoal attach {id}`\n".encode()
    second = attach()
    assert second.communicate(b"two\nthree\n", timeout=30) == (b"got two\ngot three\nover\n", b"err two\nerr three\n")
    assert second.returncode == 6
    refused(node.run("attach", id), 7, "FAILED_PRECONDITION", "is stopped")
    node.ok("rm", id)


def test_what_was_read_when_one_leaves_is_not_lost(node: Shoal, image: str) -> None:
    id = unique("stuck")
    script = "read line; seq 1 100000; read line; exit 2"
    node.ok("run", "-d", "-i", "--name", id, image, "sh", "-c", script)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    first = node.spawn("attach", "--no-sig-proxy", id, **pipes)
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(b"go\n")
    first.stdin.flush()
    # Nobody reads: it has read more than it could write when our pipe is full.
    eventually(lambda: unread(first.stdout) == 1 << 16)
    first.send_signal(signal.SIGINT)
    told = first.stdout.read()
    assert first.wait(30) == 128 + signal.SIGINT
    second = node.spawn("attach", id, **pipes)
    told += second.communicate(b"end\n", timeout=30)[0]
    assert second.returncode == 2
    assert told == b"".join(b"%d\n" % number for number in range(1, 100_001))
    node.ok("rm", id)


def test_who_is_deaf_to_signals_is_left_by_insisting(node: Shoal, image: str) -> None:
    id = unique("deaf")
    # The first process of a container ignores what it has no handler for.
    running = node.spawn(
        "run", "--name", id, image, "sh", "-c", "echo ready; exec sleep 1000", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    assert ended_by(running, signal.SIGINT, times=3) == 128 + signal.SIGINT
    assert running.communicate()[1] == f"shoal: container {id} goes on; come back with `shoal attach {id}`\n".encode()
    assert node.json("inspect", id)["task"]["status"] == "running"
    node.ok("rm", "--force", id)


def test_who_waits_for_its_reader_alone_is_ended_by_a_signal(node: Shoal, box: str) -> None:
    script = "seq 1 18500; touch /tmp/said"  # more than our pipe holds, and less than it and the process's own
    running = node.spawn("exec", box, "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    eventually(lambda: node.run("exec", box, "test", "-e", "/tmp/said").returncode == 0)
    eventually(lambda: [one["command"] for one in node.json("top", box)] == ["sleep 100000"])
    assert running.poll() is None
    assert ended_by(running, signal.SIGTERM) == 128 + signal.SIGTERM
    assert running.stdout is not None
    assert running.stdout.read(2) == b"1\n"
    running.stdout.close()


def test_signals_are_passed_on_by_who_is_attached(node: Shoal, image: str) -> None:
    id = unique("trapping")
    script = "trap 'echo caught; exit 5' TERM; while :; do echo here; sleep 0.05; done"
    node.ok("run", "-d", "-i", "--name", id, image, "sh", "-c", script)
    running = node.spawn("attach", id, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"here\n"
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=30)
    assert out.endswith(b"caught\n")
    assert running.returncode == 5
    node.ok("rm", id)
