"""`shoal run`, `exec` and `attach` at a terminal: it behaves as if the container were here, and is left as it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.shoal import Shoal, eventually, refused, unique
from tests.e2e.terminal import Terminal

pytestmark = pytest.mark.usefixtures("in_either_process")

LEAVE = b"\x10\x11"  # ctrl-p, ctrl-q
HUNG_UP = (128 + signal.SIGHUP, -signal.SIGHUP)
"""The same to a shell: it left for the signal, or, done already when that came, died of it."""
SIZES = (
    "stty size; trap 'stty size' WINCH; trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.05; done"
)


def status(node: Shoal, id: str) -> str:
    [listed] = [one for one in node.json("ps", "--all") if one["id"] == id]
    return str(listed["task"]["status"])


@pytest.fixture
def shell(node: Shoal, image: str) -> Iterator[str]:
    """The id of a container with a terminal and a shell that says little, to be attached to."""
    id = unique("shell")
    node.ok("run", "-d", "-it", "--name", id, "-e", "PS1=$ ", image, "sh")
    yield id
    node.run("rm", "--force", id)


@pytest.mark.parametrize("command", ["run", "exec"])
def test_its_size_is_right_at_once_and_follows_ours_and_ctrl_c_is_not_for_us(
    node: Shoal, image: str, box: str, command: str
) -> None:
    arguments = ["run", "--rm", "-it", image] if command == "run" else ["exec", "-it", box]
    with Terminal(node, *arguments, "sh", "-c", SIZES, rows=33, columns=101) as terminal:
        assert terminal.until(b"ready\r\n").startswith(b"33 101\r\n")
        terminal.until_raw()
        terminal.resize(44, 120)
        terminal.until(b"44 120\r\n")
        terminal.type(b"\x03")
        assert terminal.ends() == 7
        assert terminal.rest() == b"^Cinterrupted\r\n"
        assert terminal.modes == terminal.before


def test_what_is_left_goes_on_and_is_come_back_to(node: Shoal, image: str) -> None:
    id = unique("left")
    with Terminal(node, "run", "--name", id, "-it", "-e", "PS1=$ ", image, "sh") as terminal:
        terminal.until_raw()
        terminal.type(b"echo $((40 + 2))\r")
        terminal.until(b"\n42\r\n")
        terminal.type(LEAVE[:1])
        terminal.type(LEAVE[1:])
        assert terminal.ends() == 0
        assert terminal.rest().endswith(
            f"\nshoal: container {id} goes on; come back with `shoal attach {id}`\r\n".encode()
        )
        assert terminal.modes == terminal.before
    assert status(node, id) == "running"
    for number in (2, 3):
        with Terminal(node, "attach", id, rows=20 + number, columns=70) as terminal:
            terminal.until_raw()
            terminal.type(b"echo $((40 + %d))\r" % number)
            terminal.until(b"\n4%d\r\n" % number)
            if number == 2:
                terminal.type(LEAVE)
                assert terminal.ends() == 0
            else:
                terminal.type(b"stty size\r")
                terminal.until(b"\n23 70\r\n")
                terminal.type(b"exit 5\r")
                assert terminal.ends() == 5
            assert terminal.modes == terminal.before
    refused(node.run("attach", id), 7, "FAILED_PRECONDITION", "is stopped")
    node.ok("rm", id)
    assert not (node.state / "fifo" / "default" / id).exists()


def test_an_exec_is_left_by_keys_of_ones_own_and_their_beginning_is_passed_on(node: Shoal, box: str) -> None:
    with Terminal(node, "exec", "-it", "--detach-keys", "ctrl-a,x", box, "cat", "-v") as terminal:
        terminal.until_raw()
        terminal.type(b"\x01b\x10\r")
        terminal.until(b"\n^Ab^P\r\n")
        terminal.type(b"\x01x")
        assert terminal.ends() == 0
        assert terminal.modes == terminal.before
        [id] = re.findall(rb"shoal attach --exec (\S+) box-\w+`", terminal.rest())
    with Terminal(node, "attach", "--exec", id.decode(), box) as terminal:
        terminal.until_raw()
        terminal.type(b"once more\r")
        terminal.until(b"\nonce more\r\n")
        terminal.type(b"\x04")
        assert terminal.ends() == 0
        assert terminal.modes == terminal.before


def test_nothing_is_lost_or_doubled_while_nobody_is_there(node: Shoal, image: str) -> None:
    id = unique("counting")
    script = "i=0; while [ $i -lt 300 ]; do echo n$i; i=$((i+1)); sleep 0.005; done; read line; exit 4"
    told = b""
    with Terminal(node, "run", "--name", id, "-it", image, "sh", "-c", script) as terminal:
        terminal.until(b"n20\r\n")
        terminal.type(LEAVE)
        assert terminal.ends() == 0
        told += terminal.shown
    with Terminal(node, "attach", id) as terminal:
        terminal.until(b"n299\r\n")
        terminal.type(b"\r")
        assert terminal.ends() == 4
        told += terminal.shown
    assert re.findall(rb"^n(\d+)\r?$", told, re.MULTILINE) == [b"%d" % number for number in range(300)]
    node.ok("rm", id)


@pytest.mark.parametrize("command", ["run", "exec"])
def test_much_output_comes_to_the_last_byte(node: Shoal, image: str, box: str, command: str) -> None:
    arguments = ["run", "--rm", "-t", image] if command == "run" else ["exec", "-t", box]
    with Terminal(node, *arguments, "seq", "1", "50000") as terminal:
        assert terminal.ends() == 0
        assert terminal.shown == b"".join(b"%d\r\n" % number for number in range(1, 50001))


def test_much_that_is_pasted_goes_in(node: Shoal, box: str) -> None:
    script = "stty -echo -icanon; echo go; head -c 300000 | wc -c"
    with Terminal(node, "exec", "-it", box, "sh", "-c", script) as terminal:
        terminal.until(b"go\r\n")
        terminal.until_raw()
        pasting = threading.Thread(target=terminal.type, args=(b"x" * 300_000,))
        pasting.start()
        terminal.until(b"300000\r\n")
        pasting.join()
        assert terminal.ends() == 0


def test_the_terminal_is_as_it_was_whatever_ends_it(node: Shoal, image: str, shell: str) -> None:
    id = unique("gone")
    # A signal of our own: the container goes on.
    with Terminal(node, "attach", shell) as terminal:
        terminal.until_raw()
        terminal.signal(signal.SIGTERM)
        assert terminal.ends() == 128 + signal.SIGTERM
        assert terminal.modes == terminal.before
        assert f"shoal: container {shell} goes on".encode() in terminal.rest()
    # Its window is closed: the same.
    with Terminal(node, "attach", shell) as terminal:
        terminal.until_raw()
        terminal.hang_up()
        assert terminal.process.wait(30) in HUNG_UP
    # The container stands still, and what is typed meanwhile comes when it goes on.
    with Terminal(node, "attach", shell) as terminal:
        terminal.until_raw()
        node.ok("pause", shell)
        terminal.type(b"echo $((40 + 2))\r")
        terminal.resize(30, 90)
        node.ok("resume", shell)
        terminal.until(b"\n42\r\n")
        # Somebody kills it.
        node.ok("kill", shell)
        assert terminal.ends() == 137
        assert terminal.modes == terminal.before
    # Somebody removes it.
    with Terminal(node, "run", "--name", id, "-it", image, "sleep", "1000") as terminal:
        terminal.until_raw()
        node.ok("rm", "--force", id)
        assert terminal.ends() == 137
        assert terminal.modes == terminal.before
    # It never began.
    with Terminal(node, "run", "--rm", "-it", image, "nope") as terminal:
        assert terminal.ends() == 127
        assert terminal.modes == terminal.before
        assert b'exec: "nope": executable file not found in $PATH' in terminal.shown


def test_an_exec_whose_terminal_goes_is_ended(node: Shoal, box: str) -> None:
    for ending in (signal.SIGTERM, signal.SIGHUP):
        with Terminal(node, "exec", "-it", box, "sh", "-c", "echo ready; sleep 1000") as terminal:
            terminal.until(b"ready")
            terminal.until_raw()
            if ending == signal.SIGHUP:
                terminal.hang_up()
                assert terminal.process.wait(30) in HUNG_UP
            else:
                terminal.signal(ending)
                assert terminal.ends() == 128 + ending
                assert terminal.modes == terminal.before
        assert [one["command"] for one in node.json("top", box)] == ["sleep 100000"]


def test_one_at_a_time_is_attached(node: Shoal, shell: str) -> None:
    with Terminal(node, "attach", shell) as terminal:
        terminal.until_raw()
        refused(node.run("attach", "--no-stdin", shell), 7, "FAILED_PRECONDITION", "somebody else", "detach")
        terminal.type(b"echo $((40 + 2))\r")
        terminal.until(b"\n42\r\n")
        terminal.type(LEAVE)
        assert terminal.ends() == 0


def test_a_terminal_is_looked_at_without_one(node: Shoal, shell: str) -> None:
    refused(node.run("attach", shell), 7, "FAILED_PRECONDITION", "not a terminal", "--no-stdin")
    looking = node.spawn(
        "attach", "--no-stdin", "--no-sig-proxy", shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert looking.stdout is not None
    while b"\n$ " not in looking.stdout.peek():
        assert looking.poll() is None
    looking.send_signal(signal.SIGINT)
    _, err = looking.communicate(timeout=30)
    assert looking.returncode == 128 + signal.SIGINT
    assert err == f"shoal: container {shell} goes on; come back with `shoal attach {shell}`\n".encode()
    assert status(node, shell) == "running"


def test_a_container_without_streams_is_not_attached_to(node: Shoal, box: str) -> None:
    refused(node.run("attach", box), 7, "FAILED_PRECONDITION", "no streams", "`shoal run -d -i`")
    refused(node.run("attach", "nobody"), 4, "NOT_FOUND", "container nobody: not found")
    refused(node.run("attach", "--exec", "x-1", box), 4, "NOT_FOUND", "has no exec x-1")


def test_its_kind_of_terminal_is_ours(node: Shoal, box: str) -> None:
    with Terminal(
        node, "exec", "-t", box, "sh", "-c", "tty; echo $TERM; test -t 0 && test -t 1 && test -t 2"
    ) as terminal:
        assert terminal.ends() == 0
        assert re.fullmatch(rb"/dev/pts/\d+\r\nxterm\r\n", terminal.shown)


def test_stats_and_events_at_a_terminal_leave_it_as_it_was(node: Shoal, box: str) -> None:
    for command in (["stats", "--interval", "0.1"], ["events", "--since", "10m"]):
        with Terminal(node, *command, columns=140) as terminal:
            terminal.until(b"box")
            terminal.type(b"\x03")
            assert terminal.ends() == 130
            assert terminal.modes == terminal.before
            assert b"Traceback" not in terminal.shown


def test_json_on_a_terminal_is_json(node: Shoal, box: str) -> None:
    with Terminal(node, "inspect", box, rows=24, columns=80) as terminal:
        assert terminal.ends() == 0
        assert json.loads(terminal.shown)["id"] == box
    assert eventually(lambda: status(node, box)) == "running"
