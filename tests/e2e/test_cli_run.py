"""`pull`, `run` and what follows a container's life, as a person at a shell has them."""

from __future__ import annotations

import json
import os
import pty
import secrets
import select
import signal
import struct
import subprocess
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from shoal_runtime.shim import cgroups

from tests.e2e.shoal import Shoal


def name() -> str:
    return f"e2e-{secrets.token_hex(4)}"


def one_line(done: subprocess.CompletedProcess[str], status: int, code: str) -> None:
    """A command that failed as it should: its exit code, and one line with the canonical code."""
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("shoal: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"[{code}]" in done.stderr


def test_pull_returns_when_unpacked_and_the_image_is_listed(node: Shoal, image: str) -> None:
    (listed,) = [entry for entry in node.json("images") if entry["name"] == image]
    assert listed["target"]["digest"].startswith("sha256:")
    assert image in node.ok("images")
    resolved = node.json("inspect", image)
    assert resolved["config"]["config"]["Env"] == ["PATH=/bin", "FROM_IMAGE=yes"]
    again = node.run("pull", image)
    assert again.returncode == 0
    assert again.stdout.split()[0] == image


def test_pull_shows_bars_on_a_terminal_and_lines_elsewhere(node: Shoal, busybox: str) -> None:
    node.run("rmi", busybox)
    plain = node.run("pull", busybox)
    assert plain.returncode == 0
    assert "\x1b" not in plain.stderr
    assert "done" in plain.stderr
    parent, child = pty.openpty()
    pulling = node.spawn("pull", busybox, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=child)
    os.close(child)
    shown = read_to_end(parent)
    assert pulling.wait(60) == 0
    assert b"\x1b[" in shown
    os.close(parent)


def test_errors_of_pull_are_one_line(node: Shoal, busybox: str) -> None:
    host = busybox.partition("/")[0]
    one_line(node.run("pull", "--quiet", f"{host}/nothing/here"), 4, "NOT_FOUND")
    one_line(node.run("pull", "--quiet", "127.0.0.1:1/nothing"), 3, "UNAVAILABLE")
    one_line(node.run("pull", "--quiet", "--platform", "linux/s390x", busybox), 4, "NOT_FOUND")


def test_run_passes_on_output_and_the_exit_status(node: Shoal, image: str) -> None:
    done = node.run("run", "--rm", image, "sh", "-c", "echo to-out; echo to-err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "to-out\n", "to-err\n")
    assert node.ok("run", "--rm", image) == "its own command\n"
    assert node.json("ps", "--all") == []


def test_no_exit_status_is_lost_however_short_the_container(node: Shoal, image: str) -> None:
    for status in range(20, 30):
        done = node.run("run", "--rm", image, "sh", "-c", f"echo {status}; exit {status}")
        assert (done.returncode, done.stdout) == (status, f"{status}\n"), done.stderr


def test_much_output_comes_whole(node: Shoal, image: str) -> None:
    done = node.run("run", "--rm", image, "sh", "-c", "seq 1 300000")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(number) for number in range(1, 300001)]


def test_input_goes_in_and_ends(node: Shoal, image: str) -> None:
    data = b"line\n" * 100_000
    done = node.run("run", "--rm", "-i", image, "wc", "-c", stdin=data)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(data)))
    assert node.run("run", "--rm", "-i", image, "cat", stdin=b"").stdout == ""


def test_options_reach_the_container(node: Shoal, image: str) -> None:
    script = "echo $FROM_IMAGE $GIVEN; hostname; pwd; id -u; touch /x 2>/dev/null || echo read-only"
    out = node.ok(
        "run", "--rm", "-e", "GIVEN=1", "--hostname", "hal", "--workdir", "/tmp", "--user", "65534", "--read-only",
        image, "sh", "-c", script,
    )  # fmt: skip
    assert out.splitlines() == ["yes 1", "hal", "/tmp", "65534", "read-only"]


def test_a_detached_container_is_listed_inspected_stopped_and_removed(node: Shoal, image: str) -> None:
    id = name()
    assert node.ok("run", "-d", "--name", id, "--label", "a=b", image, "sleep", "300") == f"{id}\n"
    (listed,) = node.json("ps")
    assert (listed["id"], listed["image"], listed["task"]["status"]) == (id, image, "running")
    assert id in node.ok("ps")
    inspected = node.json("inspect", id)
    assert inspected["labels"]["a"] == "b"
    assert inspected["task"]["pid"] > 0
    one_line(node.run("run", "--name", id, image, "true"), 125, "ALREADY_EXISTS")
    one_line(node.run("rm", id), 7, "FAILED_PRECONDITION")
    node.ok("stop", "--time", "1", id)
    assert node.json("ps") == []
    (stopped,) = node.json("ps", "--all")
    assert (stopped["task"]["status"], stopped["task"]["exit_status"]) == ("stopped", 137)
    assert "exited (137)" in node.ok("ps", "-a")
    assert node.ok("rm", id) == f"{id}\n"
    assert node.json("ps", "--all") == []
    one_line(node.run("inspect", id), 4, "NOT_FOUND")
    one_line(node.run("rm", id), 4, "NOT_FOUND")


def test_kill_sends_the_signal_asked_for(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, image, "sh", "-c", "trap 'exit 42' USR1; while :; do sleep 0.1; done")
    time.sleep(0.3)
    node.ok("kill", "-s", "USR1", id)
    deadline = time.monotonic() + 20
    while (status := node.json("inspect", id)["task"])["status"] != "stopped":
        assert time.monotonic() < deadline
    assert status["exit_status"] == 42
    node.ok("rm", id)
    one_line(node.run("kill", id), 4, "NOT_FOUND")


def test_rm_force_ends_what_runs(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, image, "sleep", "300")
    pid = node.json("inspect", id)["task"]["pid"]
    node.ok("rm", "-f", id)
    assert not Path(f"/proc/{pid}").exists()


def test_a_detached_container_with_rm_removes_itself(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--rm", "--name", id, image, "sleep", "0.2")
    deadline = time.monotonic() + 20
    while node.json("ps", "--all"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    topics = [event["topic"] for event in events_of(node, id)]
    assert topics[-3:] == ["/tasks/exit", "/tasks/delete", "/containers/delete"]


def test_several_names_are_each_done_and_the_first_error_is_the_status(node: Shoal, image: str) -> None:
    first, second = name(), name()
    for id in (first, second):
        node.ok("run", "-d", "--name", id, image, "sleep", "300")
    done = node.run("rm", "-f", first, "not-there", second)
    assert done.returncode == 4
    assert done.stdout.split() == [first, second]
    assert node.json("ps", "--all") == []


def test_signals_are_passed_on_to_an_attached_container(node: Shoal, image: str) -> None:
    script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    running = node.spawn("run", "--rm", image, "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.stdout.read() == b"caught\n"
    assert running.wait(30) == 5


def test_a_terminal_is_a_terminal_with_our_size_and_is_restored(node: Shoal, image: str) -> None:
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 97, 0, 0))
    before = termios.tcgetattr(child)
    script = (
        "test -t 0 && test -t 1 && echo is-a-tty; read line; stty size; echo got $line; read again; stty size; exit 3"
    )
    running = node.spawn("run", "--rm", "-ti", image, "sh", "-c", script, stdin=child, stdout=child, stderr=child)
    read_until(parent, b"is-a-tty")
    assert termios.tcgetattr(child)[3] & termios.ICANON == 0
    wait_for_size = time.monotonic() + 1
    while time.monotonic() < wait_for_size:
        time.sleep(0.1)
    os.write(parent, b"hello\r")
    assert b"33 97" in read_until(parent, b"got hello")
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 101, 0, 0))
    running.send_signal(signal.SIGWINCH)
    time.sleep(1)
    os.write(parent, b"more\r")
    read_until(parent, b"44 101")
    assert running.wait(30) == 3
    assert termios.tcgetattr(child) == before
    os.close(parent)
    os.close(child)


def test_ctrl_c_at_a_terminal_is_the_containers(node: Shoal, image: str) -> None:
    parent, child = pty.openpty()
    script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    running = node.spawn("run", "--rm", "-t", image, "sh", "-c", script, stdin=child, stdout=child, stderr=child)
    read_until(parent, b"ready")
    os.write(parent, b"\x03")
    read_until(parent, b"interrupted")
    assert running.wait(30) == 9
    os.close(parent)
    os.close(child)


def test_run_pulls_what_is_missing_and_says_so(node: Shoal, busybox: str) -> None:
    node.run("rmi", busybox)
    done = node.run("run", "--rm", busybox, "echo", "pulled")
    assert (done.returncode, done.stdout) == (0, "pulled\n")
    assert "pulling" in done.stderr
    node.ok("rmi", busybox)
    assert all(entry["name"] != busybox for entry in node.json("images"))
    node.ok("pull", busybox)


def test_errors_of_run_are_one_line_and_leave_nothing(node: Shoal, image: str) -> None:
    one_line(node.run("run", "--name", "not/one", image), 125, "INVALID_ARGUMENT")
    one_line(node.run("run", "--runtime", "no-such-runtime", image, "true"), 125, "FAILED_PRECONDITION")
    missing = node.run("run", "--rm", image, "no-such-command")
    assert missing.returncode == 127
    assert missing.stderr.count("\n") == 1
    assert "no-such-command" in missing.stderr
    assert node.json("ps", "--all") == []


def test_namespaces_do_not_see_one_another(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, image, "sleep", "300")
    assert node.json("ps", "--namespace", "elsewhere", "--all") == []
    one_line(node.run("inspect", "-n", "elsewhere", id), 4, "NOT_FOUND")
    node.ok("rm", "-f", id)


@pytest.mark.parametrize("mode", ["none", "host"])
def test_a_network_mode_shows_its_links(node: Shoal, image: str, mode: str) -> None:
    out = node.ok("run", "--rm", "--net", mode, image, "ls", "/sys/class/net")
    expected = {"lo"} if mode == "none" else {link.name for link in Path("/sys/class/net").iterdir()}
    assert "lo" in out.split()
    assert mode == "host" or set(out.split()) == expected


def test_a_bridge_connects_two_containers(node: Shoal, image: str) -> None:
    bridge, server = f"sh{secrets.token_hex(3)}", name()
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    options = ["--net", "bridge", "--bridge", bridge]
    node.ok("run", "-d", "--name", server, *options, "--ip", f"{subnet}.2/24", image, "sleep", "300")
    out = node.ok(
        "run", "--rm", *options, "--ip", f"{subnet}.3/24", "--gateway", f"{subnet}.2", image,
        "sh", "-c", f"ping -c1 -W3 {subnet}.2 >/dev/null && echo reached; ip route",
    )  # fmt: skip
    assert "reached" in out
    assert f"default via {subnet}.2" in out
    node.ok("rm", "-f", server)
    assert node.json("network", "ls") == []


def test_the_events_of_a_run_are_complete_and_in_order(node: Shoal, image: str) -> None:
    id = name()
    assert node.run("run", "--rm", "--name", id, image, "sh", "-c", "exit 3").returncode == 3
    deadline = time.monotonic() + 20
    while "/containers/delete" not in (topics := [event["topic"] for event in events_of(node, id)]):
        assert time.monotonic() < deadline, topics
    assert topics == [
        "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete",
    ]  # fmt: skip
    (exit,) = [event for event in events_of(node, id) if event["topic"] == "/tasks/exit"]
    assert exit["payload"]["exit_status"] == 3


def test_output_that_nobody_wants_ends_the_run(node: Shoal, image: str) -> None:
    running = node.spawn(
        "run", "--rm", image, "sh", "-c", "while :; do echo y; done", stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"y\n"
    running.stdout.close()
    assert running.wait(30) == 128 + signal.SIGPIPE
    deadline = time.monotonic() + 20
    while node.json("ps", "--all"):
        assert time.monotonic() < deadline


def events_of(node: Shoal, id: str) -> list[dict[str, Any]]:
    """The runtime's events about a container."""
    out = node.ok("events", "--json", "--no-follow", "--filter", f"id={id}", "--filter", "service=runtime")
    return [json.loads(line) for line in out.splitlines()]


def read_until(fd: int, text: bytes, seconds: float = 30) -> bytes:
    """What comes from a terminal, up to and with `text`."""
    data = b""
    deadline = time.monotonic() + seconds
    while text not in data:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {data!r}"
        data += os.read(fd, 4096)
    return data


def read_to_end(fd: int) -> bytes:
    """What comes from a terminal until nobody has it open any more."""
    data = b""
    while True:
        try:
            part = os.read(fd, 65536)
        except OSError:
            return data
        if not part:
            return data
        data += part


def test_limits_of_a_run_hold(node: Shoal, image: str) -> None:
    id = name()
    limits = ["--memory", "48m", "--cpus", "0.5", "--pids-limit", "20"]
    node.ok("run", "--detach", "--name", id, *limits, image, "sleep", "60")
    pid = node.json("inspect", id)["task"]["pid"]
    limited = {
        ("memory.limit_in_bytes", "memory.max"): 48 << 20, ("cpu.cfs_quota_us", "cpu.max"): 50_000,
        ("pids.max", "pids.max"): 20,
    }  # fmt: skip
    places = [Path(directory) for directory, _ in cgroups.of(pid)]
    for names, value in limited.items():
        (file,) = {place / name for place in places for name in names if (place / name).exists()}
        assert int(file.read_text().split()[0]) == value
    node.ok("rm", "--force", id)
    one_line(node.run("run", "--memory", "much", image, "true"), 125, "INVALID_ARGUMENT")
