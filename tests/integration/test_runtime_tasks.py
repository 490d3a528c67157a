"""Containers and tasks over the bus: real runc, real nats-server, the service as a process of its own."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Stdio

from tests.support import bundle as bundles
from tests.support import process_table
from tests.support.natsd import NatsServer
from tests.support.runtime import LIFE, RuntimeNode, runtime_node


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


async def test_a_task_lives_and_its_events_say_so_in_order(node: RuntimeNode) -> None:
    output = node.directory / "out"
    await node.container("web-1", "sh", "-c", "echo hello; exit 7")
    request = api.CreateTask(
        container_id="web-1", rootfs=bundles.bind(node.rootfs), stdio=Stdio(stdout=f"file://{output}")
    )
    created = await node.client.call(api.TASK_CREATE, request)
    assert created.status == "created"
    assert created.pid > 0
    assert (Path(created.bundle) / "config.json").stat().st_mode & 0o777 == 0o600
    started = await node.start("web-1")
    assert started.pid == created.pid
    exit = await node.wait("web-1")
    assert exit.exit_status == 7
    stopped = await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="web-1"))
    assert (stopped.status, stopped.exit_status, stopped.exited_at) == ("stopped", 7, exit.exited_at)
    assert await node.delete("web-1") == exit
    assert output.read_text() == "hello\n"
    assert await node.topics_end("web-1", "/tasks/delete") == LIFE
    assert not Path(created.bundle).exists()
    told = next(e for e in node.events if e.topic == "/tasks/exit")
    assert told.payload["exit_status"] == 7
    assert told.payload["pid"] == created.pid
    with pytest.raises(NotFound):
        await node.delete("web-1")


async def test_order_holds_for_a_process_that_exits_at_once(node: RuntimeNode) -> None:
    ids = [f"quick-{n}" for n in range(12)]

    async def life(id: str) -> None:
        await node.run(id, "true")
        await node.wait(id)
        await node.delete(id)

    await asyncio.gather(*(life(id) for id in ids))
    for id in ids:
        assert await node.topics_end(id, "/tasks/delete") == LIFE


async def test_wrong_moves_are_refused_with_their_codes(node: RuntimeNode) -> None:
    client = node.client
    with pytest.raises(NotFound):
        await client.call(api.TASK_CREATE, api.CreateTask(container_id="nobody"))
    spec = node.spec(["true"])
    spec["process"]["cwd"] = "relative"
    with pytest.raises(InvalidArgument, match=r"process\.cwd"):
        await client.call(api.CONTAINER_CREATE, api.CreateContainer(id="bad", spec=spec))
    await node.create("one", "sleep", "60")
    with pytest.raises(AlreadyExists):
        await node.container("one", "true")
    with pytest.raises(AlreadyExists):
        await client.call(api.TASK_CREATE, api.CreateTask(container_id="one", rootfs=bundles.bind(node.rootfs)))
    await node.start("one")
    with pytest.raises(FailedPrecondition, match="started already"):
        await node.start("one")
    with pytest.raises(FailedPrecondition, match="running"):
        await node.delete("one")
    with pytest.raises(FailedPrecondition, match="has a task"):
        await client.call(api.CONTAINER_DELETE, api.ContainerRequest(id="one"))
    with pytest.raises(FailedPrecondition, match="running"):
        await client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="one"))
    with pytest.raises(FailedPrecondition, match="no terminal"):
        await client.call(api.TASK_RESIZE, api.ResizeTask(container_id="one", width=80, height=25))
    await node.kill("one")
    assert (await node.wait("one")).exit_status == 137
    with pytest.raises(NotFound, match="already finished"):
        await node.kill("one")
    await node.delete("one")
    await client.call(api.CONTAINER_DELETE, api.ContainerRequest(id="one"))
    with pytest.raises(NotFound):
        await client.call(api.CONTAINER_GET, api.GetContainer(id="one"))


async def test_a_task_that_cannot_be_created_leaves_nothing(node: RuntimeNode) -> None:
    with pytest.raises(FailedPrecondition, match="no-such-command"):
        await node.create("one", "no-such-command")
    with pytest.raises(NotFound):
        await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one"))
    assert not node.of_containers()
    spec = node.spec(["true"])
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id="two", spec=spec, runtime="no-such-runtime"))
    with pytest.raises(FailedPrecondition, match='runtime "no-such-runtime" not found on PATH'):
        await node.client.call(api.TASK_CREATE, api.CreateTask(container_id="two"))


async def test_a_created_task_can_be_deleted_and_its_exit_is_told(node: RuntimeNode) -> None:
    await node.create("one", "sleep", "60")
    assert (await node.delete("one")).exit_status == 137
    assert await node.topics_end("one", "/tasks/delete") == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_records_are_updated_by_field_and_filtered(node: RuntimeNode) -> None:
    client = node.client
    for n in range(3):
        request = api.CreateContainer(id=f"c{n}", image=f"image{n}", labels={"n": str(n)}, spec=node.spec(["true"]))
        await client.call(api.CONTAINER_CREATE, request)
    change = api.UpdateContainer(id="c1", image="new", labels={"a.b": "x"}, fields=["labels.a.b"])
    updated = await client.call(api.CONTAINER_UPDATE, change)
    assert (updated.image, updated.labels) == ("image1", {"n": "1", "a.b": "x"})
    with pytest.raises(InvalidArgument, match="runtime"):
        await client.call(api.CONTAINER_UPDATE, api.UpdateContainer(id="c1", fields=["runtime"]))

    async def found(*filters: str) -> list[str]:
        listed = await client.collect(api.CONTAINER_LIST, api.ListContainers(filters=list(filters), specs=False))
        assert not any(one.spec for one in listed)
        return [one.id for one in listed]

    assert await found() == ["c0", "c1", "c2"]
    assert await found("labels.n==2", "id==c0") == ["c0", "c2"]
    assert await found('labels."a.b"') == ["c1"]
    assert await client.with_namespace("other").collect(api.CONTAINER_LIST, api.ListContainers()) == []


async def test_600_waits_leave_room_for_a_kill(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    waits = [asyncio.create_task(node.wait("one")) for _ in range(600)]
    await asyncio.sleep(1)
    async with asyncio.timeout(5):
        await node.kill("one")
    exits = await asyncio.wait_for(asyncio.gather(*waits), 20)
    assert {exit.exit_status for exit in exits} == {137}


async def test_2000_containers_of_20_kb_are_listed_while_others_are_served(node: RuntimeNode) -> None:
    spec = node.spec(["true"])
    spec["annotations"] = {"padding": "x" * 20_000}
    for start in range(0, 2000, 100):
        await asyncio.gather(*(
            node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=f"c{n}", spec=spec))
            for n in range(start, start + 100)
        ))  # fmt: skip
    listing = asyncio.create_task(node.client.collect(api.CONTAINER_LIST, api.ListContainers(), timeout=60))
    while not listing.done():
        async with asyncio.timeout(2):
            await node.client.call(api.CONTAINER_GET, api.GetContainer(id="c7"))
    listed = listing.result()
    assert len(listed) == 2000
    assert all(one.spec == spec for one in listed)
    # Nothing was made for them: they go quicker than one by one.
    await asyncio.gather(*(
        node.client.call(api.CONTAINER_DELETE, api.ContainerRequest(id=one.id), timeout=60) for one in listed
    ))  # fmt: skip


async def test_the_service_opens_as_many_files_as_it_may_and_what_it_starts_as_many_as_it_was_given(
    tmp_path: Path, natsd: NatsServer
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        async with runtime_node(tmp_path, natsd) as node:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await node.run("one", "sleep", "60")
            (record,) = (node.node.state / "runtime" / "shims").glob("*/shim.json")
            shim = process_table.look(json.loads(record.read_text())["pid"])
            assert shim is not None
            for pid, limit in ((node.copy().pid, hard), (shim.parent, 300), (shim.pid, 300)):
                limits = Path(f"/proc/{pid}/limits").read_text()
                (found,) = [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")]
                assert found == [str(limit), str(hard)]
            held = {str(path.readlink()) for path in Path(f"/proc/{shim.parent}/fd").iterdir()}
            assert str(node.copy().log) not in held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
