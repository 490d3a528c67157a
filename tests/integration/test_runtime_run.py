"""Whole runs in one message, on a node of real services: all of it happens, or nothing is left."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content, network, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Stdio
from shoal_bus.wire import new_id

from tests.support import images
from tests.support.natsd import NatsServer
from tests.support.registry import Registry, running
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

CONFIG = {"User": "web", "WorkingDir": "/tmp", "Env": ["PATH=/bin", "COLOUR=blue"], "Entrypoint": ["/bin/sh", "-c"]}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def reference(registry: Registry) -> str:
    passwd = images.file("etc/passwd", b"root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n")
    group = images.file("etc/group", b"root:x:0:\nweb:x:44:\nlog:x:7:web\n")
    layers = [images.busybox_layer(), images.Layer([images.directory("etc"), passwd, group])]
    return images.push(images.Image.build(layers, config=CONFIG), registry.host, "runs")


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer, reference: str) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd, others=("content", "snapshot", "network")) as started:
        await started.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
        yield started


async def run(node: RuntimeNode, request: api.RunTask, id: str = "") -> api.Task:
    return await node.client.operate(api.TASK_RUN, request, timeout=60, id=id)


async def made(node: RuntimeNode) -> list[str]:
    """What other services hold for runs: active snapshots and networks."""
    snapshots = await node.client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
    networks = await node.client.collect(network.NETWORK_LIST, network.ListNetworks())
    return [one.key for one in snapshots if one.kind == "active"] + [one.id for one in networks]


async def nothing_left(node: RuntimeNode, id: str) -> None:
    async with asyncio.timeout(20):
        while await made(node) or node.of_containers():
            await asyncio.sleep(0.05)
    with pytest.raises(NotFound):
        await node.client.call(api.CONTAINER_GET, api.GetContainer(id=id))


async def test_a_run_is_what_the_image_says_and_is_removed_whole(node: RuntimeNode, reference: str) -> None:
    output = node.directory / "out"
    request = api.RunTask(
        id="web-1", image=reference, args=["id; pwd; echo $COLOUR $MORE; hostname; exit 4"], env=["MORE=1"],
        hostname="box", labels={"a": "b"}, stdio=Stdio(stdout=f"file://{output}"),
    )  # fmt: skip
    task = await run(node, request)
    assert task.pid > 0
    assert (await node.wait("web-1")).exit_status == 4
    told = output.read_text().splitlines()
    assert told[0] == "uid=33(web) gid=44(web) groups=7(log),44(web)"
    assert told[1:] == ["/tmp", "blue 1", "box"]
    container = await node.client.call(api.CONTAINER_GET, api.GetContainer(id="web-1"))
    assert (container.image, container.snapshotter, container.labels) == (reference, "overlayfs", {"a": "b"})
    with pytest.raises(AlreadyExists):
        await run(node, request)
    await node.delete("web-1")
    with pytest.raises(FailedPrecondition, match="made by a run"):
        await node.client.call(api.CONTAINER_DELETE, api.ContainerRequest(id="web-1"))
    await node.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="web-1"))
    await nothing_left(node, "web-1")
    assert await node.topics_end("web-1", "/tasks/delete") == LIFE
    mine = [e.topic for e in node.events if e.id == "web-1" and e.service == "runtime"]
    assert mine[0] == "/containers/create"
    assert mine[-1] == "/containers/delete"


async def test_a_run_to_be_removed_goes_at_its_exit_and_the_exit_can_still_be_asked(
    node: RuntimeNode, reference: str
) -> None:
    id = new_id()
    request = api.RunTask(id="one", image=reference, args=["exit 9"], remove=True)
    tasks = await asyncio.gather(*(run(node, request, id) for _ in range(3)))
    assert len({task.pid for task in tasks}) == 1
    await nothing_left(node, "one")
    assert (await node.wait("one")).exit_status == 9
    assert await node.topics_end("one", "/tasks/delete") == LIFE
    await run(node, api.RunTask(id="one", image=reference, args=["exit 8"], remove=True))
    assert (await node.wait("one")).exit_status == 8


async def test_a_run_is_removed_by_the_next_copy_when_its_own_is_dead(node: RuntimeNode, reference: str) -> None:
    request = api.RunTask(id="one", image=reference, args=["sleep 1"], remove=True)
    await run(node, request)
    node.copy().kill()
    await asyncio.sleep(1.5)
    await asyncio.to_thread(node.copy().start)
    await nothing_left(node, "one")
    assert await node.topics_end("one", "/tasks/delete") == LIFE


async def test_a_bridged_run_has_its_address_and_its_network_goes_with_it(node: RuntimeNode, reference: str) -> None:
    output, bridge = node.directory / "out", f"sh{secrets.token_hex(4)}"
    wanted = api.RunNetwork(mode="bridge", address="10.213.7.2/24", bridge=bridge)
    request = api.RunTask(
        id="one", image=reference, args=["ip -4 addr show eth0; sleep 60"], network=wanted,
        stdio=Stdio(stdout=f"file://{output}"),
    )  # fmt: skip
    try:
        await run(node, request)
        async with asyncio.timeout(10):
            while "10.213.7.2/24" not in output.read_text():
                await asyncio.sleep(0.05)
        await node.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="one", force=True))
        await nothing_left(node, "one")
    finally:
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


async def test_a_run_that_fails_leaves_nothing(node: RuntimeNode, reference: str) -> None:
    fails: list[tuple[api.RunTask, type[Exception], str]] = [
        (api.RunTask(id="one", image="docker.io/library/nowhere:1"), NotFound, "nowhere"),
        (
            api.RunTask(id="one", image=reference, runtime="no-such-runtime"),
            FailedPrecondition,
            '"no-such-runtime" not',
        ),
        (api.RunTask(id="one", image=reference, user="nobody-here"), InvalidArgument, "nobody-here"),
        (api.RunTask(id="one", image=reference, network=api.RunNetwork(mode="bridge")), InvalidArgument, "address"),
        (api.RunTask(id="one", image=reference, args=["x"], cwd="nowhere"), InvalidArgument, "cwd"),
        (api.RunTask(id="one", image=reference, stdio=Stdio(stdout="/no/such/fifo")), FailedPrecondition, "fifo"),
    ]
    for request, error, text in fails:
        with pytest.raises(error, match=text):
            await run(node, request)
        await nothing_left(node, "one")
    assert not [event for event in node.events if event.topic.startswith("/tasks/")]


async def test_a_snapshot_of_somebody_else_is_neither_used_nor_removed(node: RuntimeNode, reference: str) -> None:
    await node.client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key="one"))
    with pytest.raises(AlreadyExists):
        await run(node, api.RunTask(id="one", image=reference, args=["true"]))
    assert await made(node) == ["one"]
    await node.client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="one"))
    await run(node, api.RunTask(id="one", image=reference, args=["true"], remove=True))
    assert (await node.wait("one")).exit_status == 0
    await nothing_left(node, "one")
