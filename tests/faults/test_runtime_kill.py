"""The runtime service is killed, doubled, cut off from its bus: containers run on, and each exit is told once."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import NotFound
from shoal_bus.wire import new_id
from shoal_runtime.shim.mounts import unmount_all

from tests.support import bundle as bundles
from tests.support.leaks import cgroups_of
from tests.support.natsd import NatsServer
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

DELAYS = [0.0, 0.003, 0.006, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.12]


async def kill_after(node: RuntimeNode, delay: float, copy: int = 0) -> None:
    await asyncio.sleep(delay)
    node.copy(copy).kill()
    await asyncio.to_thread(node.copy(copy).start)


async def test_a_service_killed_in_the_middle_of_a_life_makes_nothing_wrong(tmp_path: Path, natsd: NatsServer) -> None:
    """Killed at many points of create, start and delete: each answers as if nothing had been, and once is told once."""
    async with runtime_node(tmp_path, natsd) as node:
        for n, delay in enumerate(DELAYS):
            id = f"c{n}"
            await node.container(id, "sh", "-c", "exit 3")
            create = api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs))
            killing = asyncio.create_task(kill_after(node, delay))
            task = await node.client.call(api.TASK_CREATE, create, timeout=60, patience=30)
            await killing
            assert task.status == "created"
            killing = asyncio.create_task(kill_after(node, delay / 4))
            await node.start(id, timeout=60, patience=30)
            await killing
            assert (await node.wait(id)).exit_status == 3
            killing = asyncio.create_task(kill_after(node, delay / 2))
            exit = await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id), timeout=60, patience=30)
            await killing
            assert exit.exit_status == 3
        for n in range(len(DELAYS)):
            assert await node.topics_end(f"c{n}", "/tasks/delete") == LIFE
        assert not node.of_containers()


async def test_containers_outlive_the_service_and_their_exits_are_told_when_it_is_back(
    tmp_path: Path, natsd: NatsServer
) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        stays = await node.run("stays", "sleep", "60")
        goes = await node.run("goes", "sh", "-c", "sleep 1; exit 5")
        node.copy().kill()
        await asyncio.sleep(1.5)
        os.kill(stays.pid, 0)
        await asyncio.to_thread(node.copy().start)
        exit = await node.wait("goes")
        assert (exit.pid, exit.exit_status) == (goes.pid, 5)
        os.kill(stays.pid, signal.SIGTERM)
        os.kill(stays.pid, signal.SIGKILL)
        assert (await node.wait("stays")).exit_status == 137
        for id in ("stays", "goes"):
            assert await node.topics_end(id, "/tasks/exit") == LIFE[:3]


async def test_two_copies_are_one_service(tmp_path: Path, natsd: NatsServer) -> None:
    """The same request to both is done once; an exit that both hear is told once; a wait survives its copy."""
    async with runtime_node(tmp_path, natsd, copies=2) as node:
        await node.container("one", "sleep", "2")
        create, id = api.CreateTask(container_id="one", rootfs=bundles.bind(node.rootfs)), new_id()
        tasks = await asyncio.gather(*(node.client.call(api.TASK_CREATE, create, id=id) for _ in range(6)))
        assert all(task == tasks[0] for task in tasks)
        repeat = {"id": new_id()}
        await asyncio.gather(*(node.start("one", **repeat) for _ in range(6)))
        waits = [asyncio.create_task(node.wait("one")) for _ in range(20)]
        await kill_after(node, 0.3)
        exits = await asyncio.wait_for(asyncio.gather(*waits), 30)
        assert {exit.exit_status for exit in exits} == {0}

        async def life(id: str) -> None:
            await node.run(id, "true")
            await node.wait(id)
            await node.delete(id)

        await asyncio.gather(*(life(f"c{n}") for n in range(16)))
        for n in range(16):
            assert await node.topics_end(f"c{n}", "/tasks/delete") == LIFE
        assert await node.topics_end("one", "/tasks/exit") == LIFE[:3]


async def test_exits_while_the_bus_is_away_are_told_once_and_in_order(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd, copies=2) as node:
        for n in range(4):
            await node.run(f"c{n}", "sh", "-c", f"sleep {1 + n}; exit {n}")
        stays = await node.run("stays", "sleep", "60")
        await asyncio.to_thread(natsd.stop)
        await asyncio.sleep(10)
        os.kill(stays.pid, 0)
        await asyncio.to_thread(natsd.start)
        for n in range(4):
            assert await node.topics_end(f"c{n}", "/tasks/exit") == LIFE[:3]
            assert (await node.wait(f"c{n}")).exit_status == n
        told = [event.id for event in node.events if event.topic == "/tasks/exit"]
        assert told == [f"c{n}" for n in range(4)]


async def test_a_shim_that_dies_takes_its_container_down(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        one, two = await node.run("one", "sleep", "60"), await node.run("two", "sleep", "60")
        os.kill(parent_of(one.pid), signal.SIGKILL)
        assert (await node.wait("one")).exit_status == 137
        node.copy().kill()
        os.kill(parent_of(two.pid), signal.SIGKILL)
        await asyncio.to_thread(node.copy().start)
        assert (await node.wait("two")).exit_status == 137
        for id in ("one", "two"):
            await node.delete(id)
            assert await node.topics_end(id, "/tasks/delete") == LIFE
        with pytest.raises(NotFound):
            await node.wait("one")


async def test_what_ran_before_a_reboot_is_told_of_as_killed(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        task = await node.run("one", "sleep", "60")
        request = api.ExecTask(container_id="one", exec_id="e", args=["sleep", "60"], start=True)
        await node.client.call(api.TASK_EXEC, request)
        node.copy().kill()
        reboot(node, "one", task.pid)
        await asyncio.to_thread(node.copy().start)
        assert (await node.wait("one")).exit_status == 137
        waited = await node.client.call(api.TASK_WAIT, api.ProcessRequest(container_id="one", exec_id="e"))
        assert waited.exit_status == 137
        await node.delete("one")
        topics = await node.topics_end("one", "/tasks/delete")
        assert topics == [*LIFE[:2], "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", *LIFE[2:]]


def reboot(node: RuntimeNode, id: str, pid: int) -> None:
    """What a reboot leaves of a container: nothing, and of the state directory neither."""
    os.kill(parent_of(pid), signal.SIGKILL)
    state = node.node.state / "runtime"
    runc = ["runc", "--root", str(state / "oci" / node.namespace), "delete", "--force", id]
    subprocess.run(runc, check=True, capture_output=True)
    unmount_all(str(state))
    for name in ("shims", "bundles", "oci"):
        shutil.rmtree(state / name)
    for cgroup in cgroups_of(node.namespace):
        cgroup.rmdir()


async def test_a_creation_that_could_not_be_undone_is_in_nobody_s_way(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        for again in (True, False):
            id = f"again-{again}"
            first = await node.create(id, "sleep", "60")
            with closing(sqlite3.connect(node.node.root / "runtime/metadata.db", isolation_level=None)) as database:
                database.execute("UPDATE tasks SET status = 'creating', request_id = 'of-nobody' WHERE id = ?", (id,))
            if again:
                create = api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs))
                assert (await node.client.call(api.TASK_CREATE, create)).pid != first.pid
                await node.delete(id)
            else:
                with pytest.raises(NotFound):
                    await node.delete(id)
            assert not node.of_containers()


def parent_of(pid: int) -> int:
    """A container's first process is its shim's child."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
