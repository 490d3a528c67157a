"""The parts of `shoal up`: its lock, its log, and how it keeps a process running."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from shoal_bus.errors import FailedPrecondition
from shoal_cli.up.bus import EmbeddedBus
from shoal_cli.up.child import LONGEST_BACKOFF_SECONDS, Child, backoff, started
from shoal_cli.up.lines import Lines
from shoal_cli.up.lock import only_one

from tests.support.leaks import lives


def test_a_second_holder_is_told_who_is_the_first(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(FailedPrecondition, match=f"process {os.getpid()}"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\nfrom shoal_cli.up.lock import only_one\n"
        "with only_one(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FailedPrecondition), only_one(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with only_one(tmp_path):
        pass


def test_backoff_doubles_up_to_a_bound() -> None:
    pauses = [backoff(n) for n in range(1, 20)]
    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_BACKOFF_SECONDS


def test_log_lines_are_json_and_name_their_process() -> None:
    out = io.StringIO()
    lines = Lines("info", out=out)
    assert lines.take("content", b'{"event": "service.ready", "level": "info"}\n') == ("content", "service.ready")
    assert lines.take("runtime", b"shoal-runtime: no runc [FAILED_PRECONDITION]\n").event.startswith("shoal-runtime")
    lines.take("bus", b"[1] 2026/01/01 00:00:00.000000 [INF] Server is ready\n")
    lines.take("bus", b"[1] 2026/01/01 00:00:00.000000 [ERR] out of space\n")
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(r["service"], r["level"]) for r in records] == [
        ("content", "info"),
        ("runtime", "warning"),
        ("bus", "error"),
    ]
    assert records[-1]["event"] == "out of space"


def test_quiet_leaves_out_what_is_no_warning_and_still_hears_it() -> None:
    out = io.StringIO()
    lines = Lines("warning", out=out)
    assert lines.take("content", b'{"event": "service.ready", "level": "info"}\n') == ("content", "service.ready")
    lines.say("process.restarts", "warning", process="content")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["process.restarts"]


def test_a_log_on_a_full_disk_stops_nobody() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        lines = Lines("info", out=io.TextIOWrapper(full, write_through=True))
        lines.say("node.stopping")
        assert lines.take("content", b'{"event": "service.ready", "level": "info"}\n') == ("content", "service.ready")


def test_the_bus_keeps_its_address_and_shows_its_credential_to_nobody(tmp_path: Path) -> None:
    first = EmbeddedBus("n", tmp_path / "root", tmp_path / "state")
    first.command()
    second = EmbeddedBus("n", tmp_path / "root", tmp_path / "state")
    assert first.address == second.address
    assert len(first.address.password) >= 32
    assert first.address.password != EmbeddedBus("n", tmp_path / "root", tmp_path / "other").address.password
    config = tmp_path / "state/nats/nats.conf"
    assert "127.0.0.1" in config.read_text()
    for path in (config, config.with_name("password")):
        assert path.stat().st_mode & 0o777 == 0o600


class Heard:
    """What a child's owner is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.restarts: list[str] = []

    def line(self, _: str, line: bytes) -> bool:
        self.lines.append(line.decode().strip())
        return self.lines[-1] == "ready"

    def restart(self, _: str, how: str, __: float) -> None:
        self.restarts.append(how)


def shell(script: str, heard: Heard) -> Child:
    return Child("test", partial(started, lambda: ["sh", "-c", script], os.environ), heard.line, heard.restart)


async def test_a_killed_child_is_started_again() -> None:
    heard = Heard()
    child = shell("echo ready; exec sleep 60", heard)
    child.start()
    await child.ready(10)
    killed = child.pid
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while heard.lines.count("ready") < 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await child.ready(10)
    assert heard.restarts == ["was killed by SIGKILL"]
    assert child.pid not in (0, killed)
    await child.stop()
    assert child.pid == 0


async def test_a_child_that_cannot_start_says_why_in_its_own_words() -> None:
    heard = Heard()
    child = shell("echo 'no such thing'; exit 3", heard)
    child.start()
    with pytest.raises(FailedPrecondition, match="exited with 3: no such thing"):
        await child.ready(20)
    await child.stop()


async def test_a_child_waiting_for_its_next_start_can_be_stopped() -> None:
    heard = Heard()
    child = shell("echo ready; exit 1", heard)
    child.start()
    while not heard.restarts:
        await asyncio.sleep(0.01)
    began = time.monotonic()
    await child.stop()
    assert time.monotonic() - began < 5


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, sys\nfrom shoal_cli.up.child import Child, started\n"
        "async def main():\n"
        "    command = ['sh', '-c', 'echo $$ > $0; exec sleep 60', sys.argv[1]]\n"
        "    child = Child('c', lambda: started(lambda: command, os.environ),"
        " lambda *_: False, lambda *_: None)\n"
        "    child.start()\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, str(file)])
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int(file.read_text())
    parent.kill()
    parent.wait()
    while lives(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)
