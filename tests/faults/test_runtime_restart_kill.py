"""Restart policies and what is killed: whatever dies when, each container has one task, and each exit is told once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from shoal_bus import restart
from shoal_bus.api import content, network
from shoal_bus.api import runtime as api
from shoal_bus.errors import NotFound
from shoal_bus.types import Stdio

from tests.support import bundle as bundles
from tests.support import images
from tests.support.leaks import mounts, processes
from tests.support.natsd import NatsServer
from tests.support.registry import running
from tests.support.restarts import AGAIN, count, lives, policy, update, wait_until
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

KILLS = 10


async def run(node: RuntimeNode, id: str, labels: dict[str, str], *args: str) -> None:
    await node.container(id, *args, labels=labels)
    create = api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs))
    await node.client.call(api.TASK_CREATE, create)
    await node.start(id)


@pytest.mark.parametrize("copies", [1, 2])
async def test_a_service_killed_in_the_middle_of_restarts(copies: int, tmp_path: Path, natsd: NatsServer) -> None:
    """Each kill follows the beginning of some restart, by a little or a little more; the others are anywhere."""
    points = random.Random(copies)
    async with runtime_node(tmp_path, natsd, copies=copies, arguments=("--restart-interval", "0.5")) as node:
        ids = ["c1", "c2", "c3"]
        for id in ids:
            await run(node, id, policy("always"), "sh", "-c", f"sleep 0.{id[1:]}; exit {id[1:]}")

        def begun() -> int:
            return sum(event.topic == "/containers/update" for event in node.events)

        for n in range(KILLS):
            seen = begun()
            await wait_until(lambda seen=seen: begun() > seen, "a restart begins")  # type: ignore[misc]
            await asyncio.sleep(points.uniform(0.0, 0.08))
            node.copy(n % copies).kill()
            await asyncio.sleep(points.choice([0.0, 0.2]))
            await asyncio.to_thread(node.copy(n % copies).start)
        before = {id: len(lives(node, id)) for id in ids}
        await wait_until(lambda: all(len(lives(node, id)) > before[id] for id in ids), "all of them go on")
        for id in ids:
            await update(node, id, {restart.STATUS: restart.STOPPED})
        for id in ids:
            again = await count(node, id)  # from here on none is started any more
            await wait_until(lambda id=id, again=again: len(lives(node, id)) == again + 1, f"{id} ends")  # type: ignore[misc]
        for id in ids:
            found = lives(node, id)
            whole = LIFE[:3] + (len(found) - 1) * AGAIN
            # One that hasn't ended by itself half a second after it was to stop is stopped, and its task goes.
            assert node.topics(id)[: len(whole)] == whole
            assert {life.exit_status for life in found[:-1]} == {int(id[1:])}
            assert found[-1].exit_status in (int(id[1:]), 137)
            assert len({life.pid for life in found}) == len(found)
            with suppress(NotFound):
                await node.delete(id)
        assert not node.of_containers()


async def test_what_ends_while_no_service_is_there_is_started_again_by_the_next(
    tmp_path: Path, natsd: NatsServer
) -> None:
    async with runtime_node(tmp_path, natsd, copies=2) as node:
        for id in ("one", "two", "three"):
            await run(node, id, policy("always"), "sleep", "1")
        for copy in (0, 1):
            node.copy(copy).kill()
        await asyncio.sleep(1.5)
        for copy in (0, 1):
            await asyncio.to_thread(node.copy(copy).start)
        for id in ("one", "two", "three"):
            await wait_until(lambda id=id: len(lives(node, id)) >= 2, f"{id} is started again")  # type: ignore[misc]
            assert node.topics(id)[:7] == LIFE[:3] + AGAIN


async def test_a_shim_that_dies_is_a_reason_to_start_again(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        await run(node, "one", policy("on-failure:1"), "sleep", "300")
        pid = (await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one"))).pid
        os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
        await wait_until(lambda: node.topics("one").count("/tasks/start") == 2, "it is started again")
        assert [life.exit_status for life in lives(node, "one")] == [137]


def started_twice(node: RuntimeNode, id: str) -> bool:
    return node.topics(id).count("/tasks/start") == 2


async def reboot(node: RuntimeNode) -> None:
    """What a reboot does to a node: no process of it is left, no mount, network or cgroup, and no state directory."""
    for service in node.node.services:
        service.kill()
    for container in (node.node.state / "runtime" / "bundles").glob("*/*"):
        for place in (node.node.state / "runtime" / "oci").glob(f"*/{container.name}/state.json"):
            pid = json.loads(place.read_text())["init_process_pid"]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for line in processes(str(node.directory)):
        with suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    await wait_until(lambda: not processes(str(node.directory)), "all of them are gone")
    for path in sorted(mounts(), reverse=True):
        if str(node.node.state) in path:
            subprocess.run(["umount", "-l", path], check=True)
    for found in await asyncio.to_thread(lambda: list(Path("/run/netns").iterdir())):
        if node.namespace in found.name:
            subprocess.run(["ip", "netns", "delete", found.name], check=True)
    for directory, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
        if node.namespace in directory:
            Path(directory).rmdir()
    shutil.rmtree(node.node.state)


async def test_after_a_reboot_what_should_run_does_again(tmp_path: Path, natsd: NatsServer) -> None:
    bridge = f"sh{secrets.token_hex(4)}"
    arguments = ("--restart-interval", "1")
    try:
        with running(tmp_path / "registry") as registry:
            reference = images.push(images.busybox_image(["sh"]), registry.host, "reboots")
            async with runtime_node(
                tmp_path, natsd, others=("content", "snapshot", "network"), arguments=arguments
            ) as node:
                await node.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
                output = node.directory / "out"
                wanted = api.RunNetwork(mode="bridge", address="10.213.8.2/24", bridge=bridge)
                script = "echo life >> /lives; cat /lives; ip -4 addr show eth0; exec sleep 300"
                bridged = api.RunTask(
                    id="bridged", image=reference, args=["sh", "-c", script], restart="always", network=wanted,
                    stdio=Stdio(stdout=f"file://{output}"),
                )  # fmt: skip
                await node.client.operate(api.TASK_RUN, bridged, timeout=60)
                for id, restarts in (("unless", "unless-stopped"), ("stopped", "unless-stopped"), ("no", "no")):
                    request = api.RunTask(id=id, image=reference, args=["sleep", "300"], restart=restarts)
                    await node.client.operate(api.TASK_RUN, request, timeout=60)
                await update(node, "stopped", {restart.EXPLICITLY_STOPPED: "true"})
                await node.kill("stopped")
                await node.wait("stopped")
                await wait_until(lambda: "10.213.8.2/24" in output.read_text(), "it has its address")
                output.unlink()
                await reboot(node)
                for service in node.node.services:
                    await asyncio.to_thread(service.start)
                await wait_until(
                    lambda: output.exists() and "10.213.8.2/24" in output.read_text(), "it has its address again", 60
                )
                # In the snapshot it had: that is on disk.
                assert output.read_text().startswith("life\nlife\n")
                for id in ("bridged", "unless"):
                    await wait_until(partial(started_twice, node, id), f"{id} runs again")
                    assert node.topics(id) == [*LIFE, *LIFE[:2]]
                    assert [life.exit_status for life in lives(node, id)] == [137]
                    assert await count(node, id) == 1
                assert node.topics("stopped") == node.topics("no") == LIFE[:3]
                (found,) = await node.client.collect(network.NETWORK_LIST, network.ListNetworks())
                assert found.id == "bridged"
                await node.remove_all()
                assert not await node.client.collect(network.NETWORK_LIST, network.ListNetworks())
    finally:
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


async def test_what_is_to_be_removed_is_not_started_again(tmp_path: Path, natsd: NatsServer) -> None:
    """Whatever its labels say; and a service that is away for a while isn't a failure of the container."""
    with running(tmp_path / "registry") as registry:
        reference = images.push(images.busybox_image(["sh"]), registry.host, "removals")
        arguments = ("--restart-interval", "1")
        async with runtime_node(tmp_path, natsd, others=("content", "snapshot"), arguments=arguments) as node:
            await node.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
            request = api.RunTask(
                id="one", image=reference, args=["sleep", "0.2"], remove=True, labels=policy("always")
            )
            await node.client.operate(api.TASK_RUN, request, timeout=60)
            assert await node.topics_end("one", "/tasks/delete") == LIFE
            with pytest.raises(NotFound):
                await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
            request = api.RunTask(id="two", image=reference, args=["sh", "-c", "exit 3"], restart="on-failure:2")
            node_snapshot = node.node.of("snapshot")
            run = await node.client.operate(
                api.TASK_RUN, request.model_copy(update={"args": ["sleep", "1"]}), timeout=60
            )
            node_snapshot.kill()
            os.kill(run.pid, signal.SIGKILL)
            await wait_until(lambda: '"restart.failed"' in node.copy().log.read_text(), "it is tried")
            assert await count(node, "two") == 0
            await asyncio.to_thread(node_snapshot.start)
            await wait_until(lambda: node.topics("two").count("/tasks/start") == 2, "it is started again")
            assert await count(node, "two") == 1
