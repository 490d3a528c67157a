"""Restart policies with a real service and runc: who is started again, how often, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from shoal_bus import restart
from shoal_bus.api import runtime as api
from shoal_bus.errors import Aborted, FailedPrecondition, NotFound

from tests.support import bundle as bundles
from tests.support.mount_lists import image, layered, left
from tests.support.natsd import NatsServer
from tests.support.restarts import AGAIN, count, lives, policy, update, wait_until
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

INTERVAL = 0.5
"""What is shortened so that the tests needn't wait for containerd's ten seconds."""


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd, arguments=("--restart-interval", str(INTERVAL))) as started:
        yield started


async def run(node: RuntimeNode, id: str, labels: dict[str, str], *args: str) -> api.Task:
    await node.container(id, *args, labels=labels)
    rootfs = bundles.bind(node.rootfs)
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id=id, rootfs=rootfs))
    return await node.start(id)


async def stays(node: RuntimeNode, id: str) -> list[str]:
    """A container's task events, after time enough for a restart that mustn't come."""
    await asyncio.sleep(2.5 * INTERVAL)
    return node.topics(id)


async def test_each_policy_starts_again_what_it_should(node: RuntimeNode) -> None:
    fails, ends = ("sh", "-c", "exit 3"), ("true",)
    await run(node, "gives-up", policy("on-failure:2"), *fails)
    await run(node, "succeeds", policy("on-failure"), *ends)
    await run(node, "always", policy("always"), *ends)
    await run(node, "default", {restart.STATUS: restart.RUNNING}, *fails)
    await run(node, "unless", policy("unless-stopped"), *ends)
    await run(node, "no", policy("no"), *fails)
    await run(node, "bad", policy("sometimes"), *fails)
    await run(node, "unlabelled", {restart.POLICY: "always"}, *fails)
    for id in ("always", "default", "unless"):
        await wait_until(lambda id=id: len(lives(node, id)) > 2, f"{id} is started again")  # type: ignore[misc]
    await wait_until(lambda: len(lives(node, "gives-up")) == 3, "on-failure:2 tries twice")
    assert await stays(node, "gives-up") == LIFE[:3] + 2 * AGAIN
    assert await count(node, "gives-up") == 2
    for id in ("succeeds", "no", "bad", "unlabelled"):
        assert node.topics(id) == LIFE[:3]
        assert await count(node, id) == 0
    assert '"restart.bad_label"' in node.copy().log.read_text()


async def test_a_restart_is_told_in_order_and_its_count_before_it(node: RuntimeNode) -> None:
    await run(node, "one", policy("on-failure:1"), "sh", "-c", "exit 3")
    await node.topics_end("one", "/tasks/exit")
    await wait_until(lambda: len(lives(node, "one")) == 2, "it is started again")
    assert [event.topic for event in node.events if event.id == "one"] == [
        "/containers/create", *LIFE[:3], "/containers/update", *AGAIN,
    ]  # fmt: skip
    (update,) = [event for event in node.events if event.topic == "/containers/update"]
    assert update.payload["labels"][restart.COUNT] == "1"
    first, second = lives(node, "one")
    assert first.pid != second.pid
    deleted = next(event for event in node.events if event.topic == "/tasks/delete")
    assert (deleted.payload["pid"], deleted.payload["exit_status"]) == (first.pid, 3)


async def test_a_crash_loop_slows_down(node: RuntimeNode) -> None:
    await run(node, "one", policy("always"), "false")
    await wait_until(lambda: len(lives(node, "one")) > 6, "it goes on", seconds=30)
    await update(node, "one", {restart.STATUS: restart.STOPPED})
    found = lives(node, "one")
    gaps = [(after.began - before.ended).total_seconds() for before, after in pairwise(found)]
    for gap, least in zip(gaps, [0.1, 0.2, 0.4, INTERVAL, INTERVAL, INTERVAL], strict=False):
        assert gap >= least


async def test_what_was_stopped_on_purpose_stays_so_until_it_is_started(node: RuntimeNode) -> None:
    await run(node, "one", policy("unless-stopped"), "sleep", "300")
    await update(node, "one", {restart.EXPLICITLY_STOPPED: "true"})
    await node.kill("one")
    await node.wait("one")
    assert await stays(node, "one") == LIFE[:3]
    task = await node.client.call(api.CONTAINER_START, api.ContainerRequest(id="one"))
    assert task.status == "running"
    record = await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
    assert not restart.is_explicitly_stopped(record.labels)
    await node.kill("one")
    await wait_until(lambda: node.topics("one").count("/tasks/start") == 3, "it is started again")
    assert await count(node, "one") == 1


async def test_a_desired_status_is_what_becomes_of_it(node: RuntimeNode) -> None:
    """Of a task that runs, of one that is paused, and of one that isn't there."""
    await run(node, "runs", policy("always"), "sleep", "300")
    await run(node, "paused", policy("always"), "sleep", "300")
    await node.client.call(api.TASK_PAUSE, api.TaskRequest(container_id="paused"))
    assert await stays(node, "paused") == [*LIFE[:2], "/tasks/paused"]
    for id in ("runs", "paused"):
        await update(node, id, {restart.STATUS: restart.STOPPED})
        await wait_until(lambda id=id: node.topics(id)[-1] == "/tasks/delete", f"{id} is stopped")  # type: ignore[misc]
    with pytest.raises(NotFound):
        await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="runs"))
    await update(node, "runs", {restart.STATUS: restart.RUNNING})
    # Without a snapshot of its own nobody knows its rootfs once its task is gone: that it can't be started is told.
    await wait_until(lambda: '"restart.failed"' in node.copy().log.read_text(), "it is tried")


async def test_a_client_that_kills_may_delete_before_anything_comes_back(tmp_path: Path, natsd: NatsServer) -> None:
    """As `nerdctl rm -f` and `ctr task rm -f` do: kill, wait, delete, with a policy that is `always`."""
    async with runtime_node(tmp_path, natsd) as node:
        await run(node, "one", policy("always"), "sleep", "300")
        await node.kill("one")
        assert (await node.wait("one")).exit_status == 137
        await node.delete("one")
        await node.client.call(api.CONTAINER_DELETE, api.ContainerRequest(id="one"))
        assert await node.topics_end("one", "/tasks/delete") == LIFE


async def test_a_new_process_writes_to_the_log_uri(node: RuntimeNode) -> None:
    log, old = node.directory / "log", node.directory / "old"
    labels = policy("on-failure:1") | {restart.LOG_URI: f"file://{log}"}
    await node.container("one", "sh", "-c", "echo out; echo err >&2; exit 1", labels=labels)
    create = api.CreateTask(
        container_id="one",
        rootfs=bundles.bind(node.rootfs),
        stdio={"stdout": f"file://{old}"},  # type: ignore[arg-type]
    )
    await node.client.call(api.TASK_CREATE, create)
    await node.start("one")
    await wait_until(lambda: len(lives(node, "one")) == 2, "it is started again")
    assert old.read_text() == "out\n"
    assert sorted(log.read_text().split()) == ["err", "out"]


async def test_a_start_that_fails_counts_and_leaves_nothing(node: RuntimeNode) -> None:
    await node.container("one", "/bin/once", labels=policy("on-failure:2"))
    once = node.rootfs / "bin/once"
    once.write_text("#!/bin/sh\nrm /bin/once\nexit 4\n")
    once.chmod(0o755)
    create = api.CreateTask(container_id="one", rootfs=bundles.bind(node.rootfs))
    await node.client.call(api.TASK_CREATE, create)
    await node.start("one")

    async def gave_up() -> bool:
        return await count(node, "one") == 2

    await wait_until(gave_up, "it is tried twice")
    await asyncio.sleep(2.5 * INTERVAL)
    assert await count(node, "one") == 2
    assert [life.exit_status for life in lives(node, "one")] == [4]
    with pytest.raises(NotFound):
        await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one"))
    assert not node.of_containers()


async def test_bad_requests(node: RuntimeNode) -> None:
    with pytest.raises(NotFound):
        await node.client.call(api.CONTAINER_START, api.ContainerRequest(id="nothing"))
    with pytest.raises(Aborted):
        await node.client.call(api.CONTAINER_RESTART, api.RestartContainer(id="nothing"))
    await run(node, "one", policy("always"), "sleep", "300")
    with pytest.raises(FailedPrecondition, match="is running"):
        await node.client.call(api.CONTAINER_START, api.ContainerRequest(id="one"))
    with pytest.raises(Aborted):
        await node.client.call(api.CONTAINER_RESTART, api.RestartContainer(id="one"))
    assert await node.topics_end("one", "/tasks/start") == LIFE[:2]


async def test_restarts_that_are_held_wait(node: RuntimeNode) -> None:
    await run(node, "one", policy("always"), "sleep", "300")
    await node.client.call(api.NODE_HOLD_RESTARTS, api.HoldRestarts(seconds=600))
    await node.kill("one")
    await node.wait("one")
    assert await stays(node, "one") == LIFE[:3]
    await node.client.call(api.NODE_HOLD_RESTARTS, api.HoldRestarts(seconds=0))
    await wait_until(lambda: node.topics("one")[-1] == "/tasks/start", "it is started again")


async def test_a_wait_for_one_process_isnt_answered_by_the_next(node: RuntimeNode) -> None:
    first = await run(node, "one", policy("always"), "sleep", "0.2")
    wait = api.WaitTask(container_id="one", pid=first.pid)
    assert (await node.client.call(api.TASK_WAIT, wait, timeout=60)).pid == first.pid
    await wait_until(lambda: len(lives(node, "one")) > 1, "it is started again")
    with pytest.raises(NotFound):
        await node.client.call(api.TASK_WAIT, wait, timeout=60)


async def test_mounts_are_activated_for_each_life_and_are_gone_with_the_last(node: RuntimeNode, tmp_path: Path) -> None:
    await node.container("layered", "sh", "-c", "echo >> /lives", labels=policy("always"))
    rootfs = layered(image(tmp_path / "disk.img", "up", "work"), node.rootfs, "up")
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id="layered", rootfs=rootfs))
    first = await node.client.call(api.MOUNT_INFO, api.MountRequest(name="layered"))
    await node.start("layered")
    await wait_until(lambda: len(lives(node, "layered")) > 2, "it is started again")
    await update(node, "layered", {restart.POLICY: "no"})
    await stays(node, "layered")
    (last,) = await node.client.collect(api.MOUNT_LIST, api.ListMounts())
    assert last.active[1].mount_point != first.active[1].mount_point
    lines = len(Path(last.active[1].mount_point, "up/lives").read_bytes())
    assert lines == len(lives(node, "layered")) > 2
    await node.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="layered", force=True))
    assert left(node.node) == []
