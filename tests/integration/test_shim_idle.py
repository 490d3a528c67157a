"""A shim without work is one small process, and nothing is lost or missed by that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from shoal_bus.errors import Internal
from shoal_bus.types import Stdio
from shoal_runtime.shim import mounts, protocol
from shoal_runtime.shims import place_of

from tests.support.leaks import Leaks, lives
from tests.support.shims import Host, reader_of, running_host, until

BOTH = ["shoal-shim", "shoal-worker"]


@pytest.fixture
async def host(tmp_path: Path, leaks: Leaks) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as running:
        yield running


async def test_the_worker_goes_and_comes_back_as_often_as_there_is_work(host: Host) -> None:
    pid = await host.run("idle", ["sleep", "60"])
    assert host.processes("idle") == BOTH
    for _ in range(3):
        await host.idle("idle")
        state = await host.supervisor.state("test", "idle")
        assert (state["status"], state["pid"]) == ("running", pid)
    await host.idle("idle")
    await host.supervisor.pause("test", "idle")
    await host.idle("idle")
    assert (await host.supervisor.state("test", "idle"))["status"] == "paused"
    await host.supervisor.resume("test", "idle")
    await host.idle("idle")
    await host.supervisor.kill("test", "idle", signal.SIGTERM, False)
    await host.supervisor.kill("test", "idle", signal.SIGKILL, False)
    assert (await host.exit_of("idle")).exit_status == 137
    await host.idle("idle")
    assert (await host.delete("idle")) is not None
    assert mounts.mounts_below(str(host.directory)) == []
    assert list((host.state / "shims").iterdir()) == []


async def test_an_exit_is_told_while_nobody_works(host: Host) -> None:
    await host.run("ends", ["sh", "-c", "sleep 3; exit 9"])
    await host.idle("ends")
    assert host.exits == []
    assert (await host.exit_of("ends")).exit_status == 9


async def test_execs_end_while_nobody_works(host: Host) -> None:
    await host.run("many", ["sleep", "60"])
    process = {"args": ["sh", "-c", "sleep 3; exit 5"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    for name in ("one", "two"):
        await host.supervisor.exec("test", "many", name, process=process, stdio=Stdio(), request_id=name)
    await host.idle("many")
    await until(lambda: len(host.exits) == 2)
    assert sorted((exit.exec_id, exit.exit_status) for exit in host.exits) == [("one", 5), ("two", 5)]
    await host.idle("many")
    assert (await host.supervisor.delete_exec("test", "many", "one")).exit_status == 5


async def test_an_oom_kill_is_told_while_nobody_works(host: Host) -> None:
    place = host.directory / "bundles/eats"
    command = ["sh", "-c", "sleep 3; head -c 200000000 /dev/zero | tail; sleep 60"]
    await host.create("eats", command)
    await host.supervisor.update("test", "eats", {"memory": {"limit": 20 << 20}})
    assert place.is_dir()
    await host.supervisor.start_task("test", "eats")
    await host.idle("eats")
    assert host.ooms == []
    await until(lambda: bool(host.ooms))
    assert host.ooms[0][0] == "eats"


async def test_streams_stay_open_while_nobody_works(host: Host) -> None:
    stdin, stdout = host.directory / "in", host.directory / "out"
    os.mkfifo(stdin)
    os.mkfifo(stdout)
    await host.run("cat", ["cat"], stdio=Stdio(stdin=str(stdin), stdout=str(stdout)))
    await host.idle("cat")
    await asyncio.to_thread(stdin.write_bytes, b"early\n")  # and its writer goes: no end of file
    await asyncio.sleep(0.2)
    assert host.processes("cat") == ["shoal-shim"], "bytes need no worker"
    thread, counted = reader_of(stdout)
    await asyncio.to_thread(stdin.write_bytes, b"late\n")
    assert host.exits == []
    await host.supervisor.close_stdin("test", "cat")
    assert (await host.exit_of("cat")).exit_status == 0
    await asyncio.to_thread(thread.join, 20)
    assert counted == [len("early\nlate\n")]


async def test_every_copy_s_connection_lasts(host: Host) -> None:
    await host.run("shared", ["sleep", "60"])
    other = host.another()
    found = await other.supervisor.start()
    assert [one.status for one in found] == ["running"]
    await host.idle("shared")
    await host.supervisor.kill("test", "shared", signal.SIGKILL, False)
    assert (await host.exit_of("shared")).exit_status == 137
    assert (await other.exit_of("shared")).exit_status == 137
    await other.supervisor.close()


async def test_a_terminal_keeps_its_worker(host: Host) -> None:
    stdin, stdout = host.directory / "in", host.directory / "out"
    os.mkfifo(stdin)
    os.mkfifo(stdout)
    thread, _ = reader_of(stdout)
    await host.run("tty", ["sh"], stdio=Stdio(stdin=str(stdin), stdout=str(stdout), terminal=True))
    await asyncio.sleep(2)
    assert host.processes("tty") == BOTH
    await asyncio.to_thread(stdin.write_bytes, b"exit 4\n")
    assert (await host.exit_of("tty")).exit_status == 4
    await asyncio.to_thread(thread.join, 20)
    await host.idle("tty")


@pytest.mark.parametrize("idle", [True, False])
async def test_orphans_are_reaped_without_a_word(idle: bool, host: Host) -> None:
    lines = "sleep 2; for i in 1 2 3; do (sleep 0.1 &) ; done; exec sleep 60"
    host_pids: dict[str, Any] = {"namespaces": [{"type": kind} for kind in ("ipc", "uts", "mount", "network")]}
    await host.create("orphans", ["sh", "-c", lines], linux=host_pids)
    await host.supervisor.start_task("test", "orphans")
    if idle:
        await host.idle("orphans")
    shim = psutil.Process(host.shim_pid("orphans"))
    await asyncio.sleep(3)
    assert [child.name() for child in shim.children() if child.status() == psutil.STATUS_ZOMBIE] == []
    assert host.processes("orphans") == ["shoal-shim"]


async def test_a_killed_worker_ends_its_shim(host: Host) -> None:
    pid = await host.run("doomed", ["sleep", "60"])
    (worker,) = [c for c in psutil.Process(host.shim_pid("doomed")).children() if c.name() == "shoal-worker"]
    worker.kill()
    assert (await host.exit_of("doomed")).exit_status == 137
    assert not lives(pid)
    deleted = await host.delete("doomed")
    assert deleted is not None
    assert deleted.exit_status == 137


async def test_a_worker_that_cannot_go_on_says_why(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    pid = await host.run("doomed", ["sleep", "60"])
    (worker,) = [c for c in psutil.Process(host.shim_pid("doomed")).children() if c.name() == "shoal-worker"]
    (host.state / "shims" / place_of("test", "doomed") / f".exit.json.{worker.pid}").mkdir()
    os.kill(pid, signal.SIGKILL)  # how it ended can't be written down
    assert (await host.exit_of("doomed")).exit_status == 137
    assert "IsADirectoryError" in capsys.readouterr().out


async def test_a_request_that_makes_no_sense_harms_nobody(host: Host) -> None:
    pid = await host.run("fine", ["sleep", "60"])
    with pytest.raises(Internal, match="kill: ValueError"):
        await host.supervisor._ask("test", "fine", {"op": "kill", "signal": "loud"})
    state = await host.supervisor.state("test", "fine")
    assert (state["status"], state["pid"]) == ("running", pid)


async def test_an_idle_shim_that_is_killed_takes_its_container_down(host: Host) -> None:
    pid = await host.run("doomed", ["sleep", "60"])
    await host.idle("doomed")
    os.kill(host.shim_pid("doomed"), signal.SIGKILL)
    assert (await host.exit_of("doomed")).exit_status == 137
    assert not lives(pid)


async def test_a_connection_without_a_request_leaves_no_shim(host: Host) -> None:
    for _ in range(3):
        _, writer = await asyncio.open_unix_connection(str(host.state / "new.sock"))
        writer.close()
        await writer.wait_closed()
    await until(lambda: _forked(host) == 0)
    await host.run("works", ["true"])
    assert (await host.exit_of("works")).exit_status == 0


@pytest.mark.parametrize("asks", [True, False])
async def test_a_first_request_may_take_its_time(asks: bool, host: Host) -> None:
    await until(lambda: _forked(host) == 0)  # a zygote that has just begun rehearses
    reader, writer = await asyncio.open_unix_connection(str(host.state / "new.sock"))
    try:
        await asyncio.sleep(2.5)  # longer than a worker waits for work
        assert _forked(host) == 1
        if asks:
            writer.write(protocol.encode({"op": "state", "n": 1}))
            (answer,) = protocol.Decoder().feed(await reader.read())
            assert answer["error"]["code"] == "UNIMPLEMENTED"
    finally:
        writer.close()
        await writer.wait_closed()
    await until(lambda: _forked(host) == 0)


def _forked(host: Host) -> int:
    """How many processes the zygote has."""
    return len(psutil.Process(_zygote(host)).children())


def _zygote(host: Host) -> int:
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == "shoal-zygote" and str(host.state) in words:
            return int(process.pid)
    raise AssertionError("there is no zygote")
