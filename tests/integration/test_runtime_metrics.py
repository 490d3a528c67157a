"""What containers use, over the bus: real containers with limits, on whatever cgroups this machine has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import InvalidArgument
from shoal_runtime.metrics.reading import hierarchies

from tests.support import bundle as bundles
from tests.support.natsd import NatsServer
from tests.support.runtime import RuntimeNode, runtime_node

MIB = 1 << 20
BURN = "while :; do :; done"


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


async def run(node: RuntimeNode, id: str, *args: str, start: bool = True, **resources: Any) -> api.Task:
    """A container with those resources (runtime-spec, config-linux.md), and its task."""
    spec = node.spec(list(args))
    spec["linux"]["resources"] = resources
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=id, spec=spec))
    request = api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs))
    created = await node.client.call(api.TASK_CREATE, request)
    return await node.start(id) if start else created


async def metrics(node: RuntimeNode, *filters: str, raw: bool = True) -> dict[str, api.ContainerMetrics]:
    """The figures of the namespace's tasks, by container."""
    request = api.ListMetrics(filters=list(filters), raw=raw)
    return {one.container_id: one for one in await node.client.collect(api.TASK_METRICS, request)}


async def one(node: RuntimeNode, id: str) -> api.ContainerMetrics:
    return (await metrics(node, f"id=={id}"))[id]


async def until(condition: Any, seconds: float = 20) -> Any:
    """What `condition()` returns once it is true."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):
            await asyncio.sleep(0.05)
    return found


async def test_limits_and_use_are_what_the_specification_and_the_processes_make_them(node: RuntimeNode) -> None:
    script = "sleep 600 & sleep 600 & wait"
    cpu = {"quota": 25_000, "period": 50_000}
    task = await run(node, "web", "sh", "-c", script, memory={"limit": 64 * MIB}, pids={"limit": 17}, cpu=cpu)

    async def three() -> api.ContainerMetrics | None:
        found = await one(node, "web")
        return found if found.pids is not None and found.pids.current == 3 else None

    found: api.ContainerMetrics = await until(three)
    assert (found.namespace, found.container_id, found.pid) == (node.namespace, "web", task.pid)
    assert found.cgroups == hierarchies().mode
    assert found.pids is not None
    assert found.pids.limit == 17
    assert found.memory is not None
    assert found.memory.limit == 64 * MIB
    assert 0 < found.memory.working_set <= found.memory.usage <= found.memory.peak < 64 * MIB
    assert found.memory.host > 64 * MIB
    assert found.memory.stat
    assert found.cpu is not None
    assert found.cpu.limit == 0.5
    assert 0 < found.cpu.usage < 20e9
    assert {"cpu", "memory", "pids", "blkio"} <= found.versions.keys()
    assert set(found.versions.values()) <= {1, 2}


async def test_what_is_not_limited_has_no_limit(node: RuntimeNode) -> None:
    await run(node, "free", "sleep", "600")
    found = await one(node, "free")
    assert found.memory is not None
    assert found.memory.limit is None
    assert found.pids is not None
    assert found.pids.limit is None
    assert found.cpu is not None
    assert found.cpu.limit is None


async def test_burnt_cpu_time_is_counted_and_a_throttled_one_says_so(node: RuntimeNode) -> None:
    quarter = {"quota": 5_000, "period": 20_000}
    await run(node, "busy", "sh", "-c", BURN, cpu=quarter)
    await run(node, "idle", "sleep", "600")
    began = await metrics(node)
    await asyncio.sleep(1.5)
    ended = await metrics(node)

    def share(id: str) -> float:
        before, after = began[id], ended[id]
        assert before.cpu is not None
        assert after.cpu is not None
        return (after.cpu.usage - before.cpu.usage) / (after.clock - before.clock)

    assert 0.02 < share("busy") < 0.4
    assert share("idle") < share("busy") / 2
    busy = ended["busy"].cpu
    assert busy is not None
    assert busy.throttled_periods > 0
    assert busy.throttled > 0
    assert busy.periods >= busy.throttled_periods


async def test_memory_over_the_limit_is_an_oom_kill_in_the_figures(node: RuntimeNode) -> None:
    # The first process stays; what it starts takes more than there is, again and again.
    script = "while :; do head -c 96000000 /dev/zero | tail -c 96000000 >/dev/null; sleep 0.2; done"
    await run(node, "greedy", "sh", "-c", script, memory={"limit": 16 * MIB, "swap": 32 * MIB})

    async def killed() -> api.ContainerMetrics | None:
        found = await one(node, "greedy")
        return found if found.memory is not None and found.memory.oom_kills > 0 else None

    found: api.ContainerMetrics = await until(killed, 60)
    assert found.memory is not None
    assert found.memory.limit_hits > 0
    assert found.memory.peak > 12 * MIB


async def test_forks_over_the_limit_are_counted(node: RuntimeNode) -> None:
    script = "while :; do (sleep 0.2 & sleep 0.2 & sleep 0.2 & sleep 0.2 & sleep 0.2 & wait) 2>/dev/null; done"
    await run(node, "forks", "sh", "-c", f"trap '' TERM; while :; do ({script}); sleep 0.1; done", pids={"limit": 4})

    async def refused() -> bool:
        found = await one(node, "forks")
        return found.pids is not None and found.pids.current <= 4 and found.pids.limit_hits > 0

    await until(refused)


async def test_an_exec_counts_in_its_containers_figures_and_has_none_of_its_own(node: RuntimeNode) -> None:
    await run(node, "web", "sleep", "600")
    request = api.ExecTask(container_id="web", exec_id="more", args=["sleep", "600"], start=True)
    await node.client.call(api.TASK_EXEC, request)
    [found] = await node.client.collect(api.TASK_METRICS, api.ListMetrics())
    assert found.pids is not None
    assert found.pids.current == 2


async def test_created_and_paused_tasks_have_figures_and_stopped_ones_are_left_out(node: RuntimeNode) -> None:
    await run(node, "created", "sleep", "600", start=False)
    await run(node, "paused", "sleep", "600")
    await run(node, "over", "true")
    await node.wait("over")
    await node.client.call(api.TASK_PAUSE, api.TaskRequest(container_id="paused"))
    await node.container("recorded", "true")
    found = await metrics(node)
    assert sorted(found) == ["created", "paused"]
    for item in found.values():
        assert item.memory is not None
        assert item.memory.usage > 0
    await node.client.call(api.TASK_RESUME, api.TaskRequest(container_id="paused"))


async def test_one_that_is_killed_is_left_out_at_once_and_a_new_task_begins_anew(node: RuntimeNode) -> None:
    await run(node, "again", "sh", "-c", f"({BURN}) & sleep 0.5; kill $!; exec sleep 600")

    async def burnt() -> api.ContainerMetrics | None:
        found = await one(node, "again")
        return found if found.cpu is not None and found.cpu.usage > 100_000_000 else None

    before: api.ContainerMetrics = await until(burnt)
    await node.kill("again")
    await node.wait("again")
    assert await metrics(node) == {}
    await node.delete("again")
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id="again", rootfs=bundles.bind(node.rootfs)))
    after = await one(node, "again")
    assert after.pid != before.pid
    assert before.cpu is not None
    assert after.cpu is not None
    assert after.cpu.usage < before.cpu.usage


async def test_one_whose_process_shares_a_cgroup_with_others_has_no_figures(node: RuntimeNode) -> None:
    task = await run(node, "moved", "sleep", "600")
    for line in Path(f"/proc/{task.pid}/cgroup").read_text().splitlines():
        _, controllers, _ = line.split(":", 2)
        for mounted in {hierarchies().v1[name].point for name in controllers.split(",") if name in hierarchies().v1}:
            Path(mounted, "cgroup.procs").write_text(str(task.pid))
        if not controllers and hierarchies().v2 is not None:
            Path(hierarchies().v2.point, "cgroup.procs").write_text(str(task.pid))  # type: ignore[union-attr]
    await run(node, "there", "sleep", "600")
    assert list(await metrics(node)) == ["there"]
    assert "metrics.no_cgroup" in node.copy().log.read_text()


async def test_a_whole_node_is_listed_with_its_namespaces_and_filters_choose(node: RuntimeNode) -> None:
    await run(node, "web-1", "sleep", "600")
    await run(node, "web-2", "sleep", "600")
    other = RuntimeNode(
        node.directory / "other", node.natsd, node.client.with_namespace(f"{node.namespace}z"), node.node
    )
    await run(other, "web-1", "sleep", "600")
    try:
        found = await node.client.collect(api.NODE_METRICS, api.ListMetrics())
        names = [(node.namespace, "web-1"), (node.namespace, "web-2"), (other.namespace, "web-1")]
        assert [(one.namespace, one.container_id) for one in found] == names
        chosen = await node.client.collect(api.NODE_METRICS, api.ListMetrics(filters=["id==web-1,namespace~=z$"]))
        assert [(one.namespace, one.container_id) for one in chosen] == names[2:]
        assert sorted(await metrics(node)) == ["web-1", "web-2"]
        assert list(await metrics(node, "id==web-2", "id==nobody")) == ["web-2"]
        with pytest.raises(InvalidArgument, match="expected"):
            await metrics(node, "id==")
    finally:
        await other.remove_all()


async def test_without_the_raw_maps_the_same_figures_are_smaller(node: RuntimeNode) -> None:
    await run(node, "web", "sleep", "600")
    [whole], [slim] = (await metrics(node)).values(), (await metrics(node, raw=False)).values()
    assert whole.memory is not None
    assert slim.memory is not None
    assert whole.memory.stat
    assert not slim.memory.stat
    assert slim.versions == whole.versions
    assert len(slim.pack()) < len(whole.pack()) / 2
