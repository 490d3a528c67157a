"""Containers outlive the node that runs them, and its parts."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.shoal import Shoal, eventually, unique
from tests.e2e.terminal import Terminal
from tests.support.leaks import Leaks


@pytest.fixture
def fresh(tmp_path: Path, leaks: Leaks) -> Iterator[Shoal]:
    with Shoal(tmp_path) as shoal:
        shoal.up()
        yield shoal


def start(node: Shoal, image: str, *command: str, restart: str = "no") -> tuple[str, int]:
    """A container in the background: its id and its process."""
    id = f"e2e-{secrets.token_hex(4)}"
    node.ok("pull", "--quiet", image)
    node.ok("run", "-d", "--restart", restart, "--name", id, image, *command)
    return id, int(node.json("inspect", id)["task"]["pid"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_container_runs_on_without_its_node_and_the_next_one_has_it(fresh: Shoal, busybox: str, how: int) -> None:
    id, pid = start(fresh, busybox, "sleep", "300")
    if how == signal.SIGKILL:
        fresh.kill()
        time.sleep(0.5)
    else:
        assert fresh.stop(how) == 0
    assert b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    fresh.up()
    (listed,) = fresh.json("ps")
    assert (listed["id"], listed["task"]["pid"]) == (id, pid)
    fresh.ok("rm", "-f", id)
    assert not Path(f"/proc/{pid}").exists()


def test_an_exit_while_the_node_was_down_is_reported_when_it_is_up(fresh: Shoal, busybox: str) -> None:
    id, pid = start(fresh, busybox, "sh", "-c", "sleep 2; exit 6")
    assert fresh.stop() == 0
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fresh.up()
    task = fresh.json("inspect", id)["task"]
    assert (task["status"], task["exit_status"]) == ("stopped", 6)
    while not (told := fresh.ok("events", "--json", "--no-follow", "-f", "topic=/tasks/exit", "-f", f"id={id}")):
        assert time.monotonic() < deadline + 20
    assert len(told.splitlines()) == 1


def test_stop_containers_ends_them_first_and_restart_policies_wait(fresh: Shoal, busybox: str) -> None:
    assert fresh.stop() == 0
    fresh.up("--stop-containers")
    # The first process of a namespace ignores TERM by itself: while this one is waited for, the other one has ended.
    id, stubborn = start(fresh, busybox, "sleep", "300")
    willing = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    always, first = start(fresh, busybox, *willing, restart="always")
    assert fresh.stop() == 0
    assert not Path(f"/proc/{stubborn}").exists()
    assert not Path(f"/proc/{first}").exists()
    assert fresh.events("containers.stopped")[-1]["count"] == 2
    fresh.up()
    deadline = time.monotonic() + 60
    while [container["id"] for container in fresh.json("ps")] != [always]:
        assert time.monotonic() < deadline
    assert any(container["id"] == id for container in fresh.json("ps", "--all"))
    starts = ("events", "--json", "--no-follow", "-f", "topic=/tasks/start", "-f", f"id={always}")
    eventually(lambda: len(fresh.ok(*starts).splitlines()) == 2)


def test_an_attached_run_survives_a_kill_of_the_runtime_service(fresh: Shoal, busybox: str) -> None:
    fresh.ok("pull", "--quiet", busybox)
    running = fresh.spawn(
        "run", "--rm", busybox, "sh", "-c", "echo begun; sleep 3; echo over; exit 4", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == b"begun\n"
    os.kill(fresh.pids["runtime"], signal.SIGKILL)
    assert running.stdout.read() == b"over\n"
    assert running.wait(60) == 4


def test_who_is_attached_goes_on_without_the_node_and_finds_the_next_one(fresh: Shoal, busybox: str) -> None:
    lost, kept = unique("deaf"), unique("shell")
    fresh.ok("pull", "--quiet", busybox)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    deaf = fresh.spawn("run", "--name", lost, busybox, "sh", "-c", "echo begun; sleep 1000", **pipes)
    assert deaf.stdout is not None
    assert deaf.stdout.readline() == b"begun\n"
    with Terminal(fresh, "run", "--name", kept, "-it", "-e", "PS1=$ ", busybox, "sh") as terminal:
        terminal.until_raw()
        os.kill(fresh.pids["runtime"], signal.SIGKILL)
        terminal.type(b"echo $((40 + 2))\r")
        terminal.until(b"\n42\r\n")
        assert fresh.stop() == 0
        deaf.send_signal(signal.SIGINT)
        terminal.resize(44, 120)
        terminal.type(b"echo $((40 + 3))\r")
        terminal.until(b"\n43\r\n")
        # A signal that can't be passed on: who is interrupted leaves, and says what becomes of the container.
        out, err = deaf.communicate(timeout=60)
        assert (deaf.returncode, out) == (128 + signal.SIGINT, b"")
        first, second = err.decode().splitlines()
        assert first.startswith("shoal: SIGINT was not passed on: ")
        assert second == f"shoal: container {lost} goes on; come back with `shoal attach {lost}`"
        fresh.up()
        # The size is passed on once there is somebody to tell, and the exit comes as ever.
        deadline = time.monotonic() + 60
        while True:
            terminal.type(b'echo "[$(stty size)]"\r')
            if b"[44 120]" in terminal.until(b"]\r\n"):
                break
            assert time.monotonic() < deadline
        terminal.type(b"exit 5\r")
        assert terminal.ends() == 5
        assert terminal.modes == terminal.before
        assert b"shoal" not in terminal.shown
        assert b"bus" not in terminal.shown.lower().replace(b"busybox", b"")
    assert {one["id"]: one["task"]["status"] for one in fresh.json("ps", "-a")} == {
        lost: "running",
        kept: "stopped",
    }
