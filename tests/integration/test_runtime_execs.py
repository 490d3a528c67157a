"""Execs over the bus: further processes of a running container, each with its own streams, exit and events."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShoalError
from shoal_bus.types import Stdio

from tests.support import bundle as bundles
from tests.support.natsd import NatsServer
from tests.support.runtime import LIFE, RuntimeNode, runtime_node


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


async def exec(node: RuntimeNode, id: str, exec_id: str, *args: str, start: bool = True, **more: Any) -> api.Task:
    request = api.ExecTask(container_id=id, exec_id=exec_id, args=list(args), start=start, **more)
    return await node.client.call(api.TASK_EXEC, request)


async def exit_of(node: RuntimeNode, id: str, exec_id: str) -> api.Exit:
    request = api.ProcessRequest(container_id=id, exec_id=exec_id)
    return await node.client.call(api.TASK_WAIT, request, timeout=60)


async def delete(node: RuntimeNode, id: str, exec_id: str, *, force: bool = False) -> api.Exit:
    request = api.DeleteTask(container_id=id, exec_id=exec_id, force=force)
    return await node.client.call(api.TASK_DELETE, request)


async def test_an_exec_has_its_own_streams_exit_and_events(node: RuntimeNode) -> None:
    task = await node.run("one", "sleep", "60")
    output = node.directory / "out"
    added = await exec(
        node, "one", "e1", "sh", "-c", "echo $A $PWD $(id -u); exit 5", start=False,
        env=["A=b"], cwd="/tmp", user="7:8", stdio=Stdio(stdout=f"file://{output}"),
    )  # fmt: skip
    assert (added.status, added.pid) == ("created", 0)
    started = await node.client.call(api.TASK_START, api.ProcessRequest(container_id="one", exec_id="e1"))
    assert started.status == "running"
    assert started.pid not in (0, task.pid)
    exit = await exit_of(node, "one", "e1")
    assert (exit.exec_id, exit.exit_status, exit.pid) == ("e1", 5, started.pid)
    stopped = await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one", exec_id="e1"))
    assert (stopped.status, stopped.exit_status) == ("stopped", 5)
    assert await delete(node, "one", "e1") == exit
    assert output.read_text() == "b /tmp 7\n"
    with pytest.raises(NotFound):
        await exit_of(node, "one", "e1")
    await node.kill("one")
    await node.wait("one")
    await node.delete("one")
    topics = await node.topics_end("one", "/tasks/delete")
    assert topics == [*LIFE[:2], "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", *LIFE[2:]]
    exits = [event.payload for event in node.events if event.topic == "/tasks/exit"]
    assert [(payload["id"], payload["exit_status"]) for payload in exits] == [("e1", 5), ("one", 137)]


async def test_many_execs_at_once_lose_no_exit(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")

    async def life(number: int) -> int:
        await exec(node, "one", f"e{number}", "sh", "-c", f"exit {number}")
        status = (await exit_of(node, "one", f"e{number}")).exit_status
        await delete(node, "one", f"e{number}")
        return status

    assert await asyncio.gather(*(life(number) for number in range(40))) == list(range(40))
    place = next((node.node.state / "runtime" / "shims").iterdir())
    assert [entry.name for entry in place.iterdir() if entry.name.startswith("exec-")] == []
    bundle = node.node.state / "runtime/bundles" / node.namespace / "one"
    assert not [entry.name for entry in bundle.iterdir() if "exec" in entry.name]


async def test_an_exec_may_have_a_terminal_and_its_input(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    for name in ("in", "out"):
        os.mkfifo(node.directory / name)
    stdio = Stdio(stdin=str(node.directory / "in"), stdout=str(node.directory / "out"), terminal=True)
    chunks: list[bytes] = []
    reader = threading.Thread(target=lambda: chunks.append((node.directory / "out").read_bytes()))
    reader.start()
    await exec(node, "one", "tty", "sh", "-c", "read line; stty size; echo got $line; seq 1 2000", stdio=stdio)
    resize = api.ResizeTask(container_id="one", exec_id="tty", width=101, height=37)
    await node.client.call(api.TASK_RESIZE, resize)
    await asyncio.to_thread((node.directory / "in").write_bytes, b"word\n")
    assert (await exit_of(node, "one", "tty")).exit_status == 0
    await asyncio.to_thread(reader.join, 20)
    text = b"".join(chunks).decode().replace("\r", "")
    assert "37 101\n" in text
    assert "got word\n" in text
    assert text.endswith("1999\n2000\n")


async def test_a_terminal_has_its_size_from_the_first_moment(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    for number in range(3):
        output = node.directory / f"out-{number}"
        stdio = Stdio(stdout=f"file://{output}", terminal=True)
        size = api.ConsoleSize(width=101 + number, height=33)
        await exec(node, "one", f"e{number}", "stty", "size", stdio=stdio, console_size=size)
        assert (await exit_of(node, "one", f"e{number}")).exit_status == 0
        await delete(node, "one", f"e{number}")
        assert output.read_bytes() == b"33 %d\r\n" % (101 + number)


async def test_an_exec_has_the_capabilities_it_asks_for_or_is_refused(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")

    async def held(*capabilities: str) -> int:
        output = node.directory / "status"
        output.unlink(missing_ok=True)
        more = {"capabilities": list(capabilities), "stdio": Stdio(stdout=f"file://{output}")}
        await exec(node, "one", "e", "grep", "CapEff", "/proc/self/status", **more)
        await exit_of(node, "one", "e")
        await delete(node, "one", "e")
        return int(output.read_text().split()[1], 16)

    net_admin = 1 << 12
    usual = await held()
    assert not usual & net_admin
    assert await held("net_admin") == usual | net_admin
    assert await held("ALL") == int(next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    ), 16)  # fmt: skip
    with pytest.raises(InvalidArgument, match="no such capability"):
        await exec(node, "one", "e", "true", capabilities=["CAP_NONSENSE"])


async def test_an_exec_that_nobody_asks_after_is_removed_when_it_has_ended(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    await exec(node, "one", "e", "sleep", "0.3", remove=True)
    assert (await exit_of(node, "one", "e")).exit_status == 0
    place = next((node.node.state / "runtime" / "shims").iterdir())
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        try:
            await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one", exec_id="e"))
        except NotFound:
            break
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    assert [entry.name for entry in place.iterdir() if entry.name.startswith("exec-")] == []
    await exec(node, "one", "e", "sleep", "60", remove=True)  # the name is free again
    await node.kill("one")
    await node.wait("one")
    await node.delete("one")
    await node.topics_end("one", "/tasks/delete")
    exits = [event.payload["id"] for event in node.events if event.topic == "/tasks/exit"]
    assert exits == ["e", "e", "one"]


async def test_wrong_execs_are_refused_with_their_codes(node: RuntimeNode) -> None:
    with pytest.raises(NotFound, match="container nobody: not found"):
        await exec(node, "nobody", "e", "true")
    await node.container("idle", "true")
    with pytest.raises(NotFound, match="container idle: has no task"):
        await exec(node, "idle", "e", "true")
    await node.run("one", "sleep", "60")
    with pytest.raises(InvalidArgument, match=r"process.*args"):
        await exec(node, "one", "e")
    with pytest.raises(FailedPrecondition, match="no-such-command"):
        await exec(node, "one", "e", "no-such-command")
    await exec(node, "one", "e", "sleep", "60")  # the name is free again
    with pytest.raises(AlreadyExists):
        await exec(node, "one", "e", "true")
    with pytest.raises(FailedPrecondition, match="started already"):
        await node.client.call(api.TASK_START, api.ProcessRequest(container_id="one", exec_id="e"))
    with pytest.raises(FailedPrecondition, match="running"):
        await delete(node, "one", "e")
    await node.client.call(api.TASK_KILL, api.KillTask(container_id="one", exec_id="e", signal=9))
    assert (await exit_of(node, "one", "e")).exit_status == 137
    with pytest.raises(NotFound, match="finished"):
        await node.client.call(api.TASK_KILL, api.KillTask(container_id="one", exec_id="e", signal=9))
    await exec(node, "one", "forced", "sleep", "60")
    assert (await delete(node, "one", "forced", force=True)).exit_status == 137
    await exec(node, "one", "unstarted", "true", start=False)
    await delete(node, "one", "unstarted")
    await node.kill("one")
    await node.wait("one")
    with pytest.raises(FailedPrecondition, match="stopped"):
        await exec(node, "one", "late", "true")
    with pytest.raises(FailedPrecondition):
        await exec(node, "one", "late", "true", stdio=Stdio(stdout="/nowhere/fifo"))


async def test_what_runs_in_a_container_that_is_killed_ends_before_it(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    for number in range(3):
        await exec(node, "one", f"e{number}", "sleep", "60")
    waits = [asyncio.create_task(exit_of(node, "one", f"e{number}")) for number in range(3)]
    await asyncio.sleep(0.1)
    await node.kill("one")
    await node.wait("one")
    assert {exit.exit_status for exit in await asyncio.gather(*waits)} == {137}
    await node.delete("one")
    await node.topics_end("one", "/tasks/delete")
    exits = [event.payload["id"] for event in node.events if event.topic == "/tasks/exit"]
    assert sorted(exits[:3]) == ["e0", "e1", "e2"]
    assert exits[3:] == ["one"]


async def test_execs_outlive_the_service_and_a_dead_shim_ends_them(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    await exec(node, "one", "short", "sh", "-c", "sleep 1; exit 4")
    await exec(node, "one", "long", "sleep", "60")
    node.copy().kill()
    await asyncio.sleep(1.5)
    node.copy().start()
    assert (await exit_of(node, "one", "short")).exit_status == 4
    place = next((node.node.state / "runtime" / "shims").iterdir())
    shim = int(json.loads((place / "shim.json").read_text())["pid"])
    os.kill(shim, 9)
    assert (await node.wait("one")).exit_status == 137
    assert (await exit_of(node, "one", "long")).exit_status == 137
    await node.delete("one")
    await node.topics_end("one", "/tasks/delete")
    exits = [
        (event.payload["id"], event.payload["exit_status"]) for event in node.events if event.topic == "/tasks/exit"
    ]
    assert exits == [("short", 4), ("long", 137), ("one", 137)]


async def test_pids_tell_the_execs(node: RuntimeNode) -> None:
    task = await node.run("one", "sh", "-c", "sleep 60 & wait")
    started = await exec(node, "one", "e1", "sleep", "60")
    found = await node.client.call(api.TASK_PIDS, api.TaskRequest(container_id="one"))
    by_pid = {process.pid: process.exec_id for process in found.processes}
    assert len(by_pid) == 3
    assert by_pid[task.pid] == ""
    assert by_pid[started.pid] == "e1"
    with pytest.raises(ShoalError):
        await node.client.call(api.TASK_PIDS, api.TaskRequest(container_id="nobody"))


async def test_a_container_ends_behind_the_execs_that_were_being_started(node: RuntimeNode) -> None:
    begun, goes_on = node.directory / "begun", node.directory / "goes-on"
    binary = node.directory / "slow-runc"
    binary.write_text(
        f"""#!/bin/sh
case " $* " in *" exec "*) touch {begun}; while [ ! -e {goes_on} ]; do sleep 0.02; done;; esac
exec runc "$@"
"""
    )
    binary.chmod(0o755)
    await node.container("one", "sleep", "60")
    create = api.CreateTask(
        container_id="one", rootfs=bundles.bind(node.rootfs), options=api.RuncOptions(binary_name=str(binary))
    )
    task = await node.client.call(api.TASK_CREATE, create)
    await node.start("one")
    starting = asyncio.create_task(exec(node, "one", "late", "true"))
    async with asyncio.timeout(20):
        while not begun.exists():
            await asyncio.sleep(0.01)
    os.kill(task.pid, 9)
    waiting = asyncio.create_task(node.wait("one"))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    # It is over for all that: nothing more is begun in it.
    with pytest.raises(FailedPrecondition, match="stopped"):
        await exec(node, "one", "later", "true")
    goes_on.touch()
    with pytest.raises(FailedPrecondition):
        await starting
    assert (await waiting).exit_status == 137
    await node.delete("one")
