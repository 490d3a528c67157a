"""Any one service is killed in the middle of a pull or a run: the command ends well or says clearly why not, a second
try succeeds, nothing is half done on disk, and the events are complete and single."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from shoal_bus.api import content, runtime, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import connect
from shoal_bus.consumer import read_events
from shoal_bus.errors import NotFound, ShoalError
from shoal_bus.events import Event

from tests.support import images
from tests.support.leaks import Leaks
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

SERVICES = ("content", "snapshot", "runtime", "network")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def reference(registry: Registry) -> str:
    """An image of four layers: busybox, and three of many small files each."""
    layers = [images.busybox_layer()]
    for number in range(3):
        names = [images.file(f"data/{number}/{i}", bytes([i % 251]) * 1500) for i in range(400)]
        layers.append(images.Layer([images.directory("data"), images.directory(f"data/{number}"), *names]))
    image = images.Image.build(layers, config={"Env": ["PATH=/bin"], "Cmd": ["sh", "-c", "exit 7"]})
    return images.push(image, registry.host, "killed", "latest")


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer, leaks: Leaks) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start(*SERVICES)
        yield started


@pytest.fixture
async def client(node: TestNode) -> AsyncIterator[Client]:
    connection = await connect(node.natsd.address, name="test")
    yield Client(connection, node.name)
    await connection.close()


async def settled(client: Client, *, enough: str, times: int = 1) -> list[Event]:
    """All events so far, once `times` of topic `enough` are among them and nothing more comes."""
    events: list[Event] = []
    for _ in range(100):
        events = [received.event async for received in read_events(client.connection, start=1, follow=False)]
        if sum(e.topic == enough for e in events) >= times:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.3)
    return [received.event async for received in read_events(client.connection, start=1, follow=False)]


def files_of(node: TestNode) -> set[str]:
    """Everything under the root that isn't a database or the bus's own."""
    return {
        str(path.relative_to(node.root))
        for path in node.root.rglob("*")
        if path.is_file() and "metadata.db" not in path.name and "/fs/" not in str(path)
    }


async def only(node: TestNode, files: set[str], when: str) -> None:
    """Waits until there are these files, and no others: what was removed is deleted a moment later."""
    for _ in range(300):
        if (found := files_of(node)) == files:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{when}: {found ^ files}")


async def pull(client: Client, reference: str) -> content.Image:
    return await client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60, patience=20)


@pytest.mark.parametrize("victim", ["content", "snapshot"])
@pytest.mark.timeout(240)
async def test_pull_survives_a_kill_at_any_moment(victim: str, node: TestNode, client: Client, reference: str) -> None:
    await pull(client, reference)
    whole = files_of(node)
    chain = await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=reference))
    outcomes: Counter[str] = Counter()
    for delay in (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3):
        pulling = asyncio.create_task(pull(client, reference))
        await asyncio.sleep(delay)
        node.of(victim).kill()
        node.of(victim).start()
        try:
            await pulling
            outcomes["finished"] += 1
        except ShoalError as error:
            outcomes[error.code.name] += 1
            await pull(client, reference)
        await only(node, whole, f"after a kill {delay} s into a pull")
        found = await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())
        assert [(s.key, s.parent, s.kind) for s in found] == [(s.key, s.parent, s.kind) for s in chain]
        await client.call(content.IMAGE_DELETE, content.ImageRequest(name=reference))
    assert outcomes["finished"] >= 1, outcomes
    events = await settled(client, enough="/images/delete", times=13)
    of_images = [event.topic for event in events if event.topic.startswith("/images/") and event.id == reference]
    assert of_images == ["/images/create", "/images/delete"] * 13


@pytest.mark.parametrize("victim", SERVICES)
@pytest.mark.timeout(240)
async def test_run_survives_a_kill_at_any_moment(victim: str, node: TestNode, client: Client, reference: str) -> None:
    await pull(client, reference)
    before = files_of(node)
    outcomes: Counter[str] = Counter()
    ids = []
    for number, delay in enumerate((0.0, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.25)):
        id = f"run-{number}"
        ids.append(id)
        request = runtime.RunTask(id=id, image=reference)
        running_it = asyncio.create_task(client.operate(runtime.TASK_RUN, request, timeout=60, patience=20))
        await asyncio.sleep(delay)
        node.of(victim).kill()
        node.of(victim).start()
        try:
            await running_it
            outcomes["finished"] += 1
        except ShoalError as error:
            outcomes[error.code.name] += 1
            with suppress(NotFound):
                await client.call(runtime.CONTAINER_REMOVE, runtime.RemoveContainer(id=id, force=True), timeout=60)
            await client.operate(runtime.TASK_RUN, request, timeout=60, patience=20)
        exit = await client.call(runtime.TASK_WAIT, runtime.ProcessRequest(container_id=id), timeout=60)
        assert exit.exit_status == 7
        await client.call(runtime.CONTAINER_REMOVE, runtime.RemoveContainer(id=id, force=True), timeout=60)
    assert outcomes["finished"] >= 1, outcomes
    assert await client.collect(runtime.CONTAINER_LIST, runtime.ListContainers()) == []
    actives = [
        s for s in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) if s.kind != "committed"
    ]
    assert actives == []
    await only(node, before, "after all of them")
    events = await settled(client, enough="/containers/delete", times=len(ids))
    for id in ids:
        topics = [e.topic for e in events if e.service == "runtime" and e.id == id]
        lives = "".join(topic + " " for topic in topics).split("/containers/create ")
        assert lives[0] == "", f"{id}: something came before its creation: {topics}"
        # A failed first try leaves a life that was begun and undone; the last one is whole.
        assert lives[-1].split() == [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
            "/containers/delete",
        ]
        for life in lives[1:-1]:
            assert life.split().count("/containers/delete") == 1, f"{id}: {topics}"
    counted = Counter((e.topic, e.id, e.timestamp) for e in events)
    assert not [key for key, times in counted.items() if times > 1]
