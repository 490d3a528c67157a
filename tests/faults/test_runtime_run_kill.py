"""Any one service is killed in the middle of a run: the run ends well or leaves nothing, and is told of once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.errors import Cancelled, NotFound, ShoalError

from tests.support import images
from tests.support.natsd import NatsServer
from tests.support.registry import running
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

DELAYS = [0.0, 0.004, 0.008, 0.015, 0.025, 0.04, 0.07, 0.1]


async def active(node: RuntimeNode) -> list[str]:
    snapshots = await node.client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
    return [one.key for one in snapshots if one.kind == "active"]


async def all_gone(node: RuntimeNode) -> None:
    async with asyncio.timeout(30):
        while await active(node) or node.of_containers():
            await asyncio.sleep(0.1)
    assert await node.client.collect(api.CONTAINER_LIST, api.ListContainers()) == []


@pytest.mark.parametrize("service", ["runtime", "snapshot", "content"])
async def test_a_run_survives_a_killed_service(service: str, tmp_path: Path, natsd: NatsServer) -> None:
    with running(tmp_path / "registry") as registry:
        reference = images.push(images.busybox_image(["sh", "-c", "exit 7"]), registry.host, "runs")
        async with runtime_node(tmp_path, natsd, others=("content", "snapshot")) as node:
            await node.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
            for n, delay in enumerate(DELAYS):
                request = api.RunTask(id=f"c{n}", image=reference, remove=True)
                running_ = asyncio.create_task(node.client.operate(api.TASK_RUN, request, timeout=60, patience=20))
                await asyncio.sleep(delay)
                victim = node.node.of(service)
                victim.kill()
                await asyncio.to_thread(victim.start)
                try:
                    await running_
                except ShoalError as error:
                    assert not isinstance(error, NotFound), error  # noqa: PT017
                    await node.client.operate(api.TASK_RUN, request, timeout=60)
                assert (await node.wait(f"c{n}")).exit_status == 7
            await all_gone(node)
            for n in range(len(DELAYS)):
                assert await node.topics_end(f"c{n}", "/tasks/delete") == LIFE


async def test_a_run_that_is_cancelled_is_undone(tmp_path: Path, natsd: NatsServer) -> None:
    """Also when the copy that began it was killed, and only the next one hears that nobody wants it."""
    with running(tmp_path / "registry") as registry:
        reference = images.push(images.busybox_image(["sleep", "60"]), registry.host, "runs")
        async with runtime_node(tmp_path, natsd, others=("content", "snapshot")) as node:
            await node.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
            for n, delay in enumerate([0.005, 0.015, 0.03, 0.05]):
                request = api.RunTask(id=f"c{n}", image=reference)
                run = asyncio.create_task(node.client.operate(api.TASK_RUN, request, timeout=60))
                await asyncio.sleep(delay)
                if n % 2:
                    node.copy().kill()
                    await asyncio.to_thread(node.copy().start)
                run.cancel()
                with suppress(asyncio.CancelledError, Cancelled):
                    await run
                await asyncio.sleep(0.5)
                with suppress(NotFound):  # it was started already
                    await node.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id=f"c{n}", force=True))
            await all_gone(node)
