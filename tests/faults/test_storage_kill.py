"""Hundreds of kills while pulls, runs, tags, deletions and collections go on: what is held is there, the rest goes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.errors import Aborted, AlreadyExists, Cancelled, DeadlineExceeded, NotFound, ShoalError, Unavailable
from shoal_bus.message import Message, Request
from shoal_bus.types import Descriptor, Stdio
from shoal_bus.verb import OperationVerb, Verb
from shoal_bus.wire import new_id

from tests.support.images import Image, Layer, busybox_layer, digest_of, directory, file, push
from tests.support.natsd import NatsServer
from tests.support.node import ServiceProcess, TestNode
from tests.support.registry import Registry, running
from tests.support.runtime import RuntimeNode, runtime_node

log = logging.getLogger(__name__)

KILLS = int(os.environ.get("SHOAL_STORAGE_KILLS", "50"))
SEED = int(os.environ.get("SHOAL_STORAGE_SEED", "0")) or random.randrange(1, 1 << 32)
WORKERS = 6
PAUSE_SECONDS = 0.3
DOWN_AT_ONCE = 2
"""Services that are starting again: the others' work goes on meanwhile."""
SERVICES = ("content", "snapshot", "runtime")
_TRANSIENT = (Unavailable, DeadlineExceeded, Aborted)
_SECONDS = 90.0

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


class Killer:
    """Kills one copy after another of the storage's services, also one that is just starting, and starts it again."""

    def __init__(self, node: TestNode, chance: random.Random) -> None:
        self._node, self._chance = node, chance
        self.counts: Counter[str] = Counter()
        self._restarts: dict[ServiceProcess, asyncio.Task[None]] = {}

    async def run(self, wanted: int) -> None:
        while self.counts.total() < wanted:
            await asyncio.sleep(self._chance.uniform(0, 2 * PAUSE_SECONDS))
            for service in [service for service, restart in self._restarts.items() if restart.done()]:
                self._restarts.pop(service).result()
            if len(self._restarts) >= DOWN_AT_ONCE:
                continue
            service = self._chance.choice([one for one in self._node.services if one.name in SERVICES])
            if service.running:
                service.signal(9)
                self.counts[service.name] += 1
                if service not in self._restarts:
                    self._restarts[service] = asyncio.create_task(self._restart(service))
        await asyncio.gather(*self._restarts.values())

    async def _restart(self, service: ServiceProcess) -> None:
        while True:
            before = self.counts[service.name]
            try:
                await asyncio.to_thread(service.kill)  # reaps it
                await asyncio.to_thread(service.start)
            except AssertionError:
                if before == self.counts[service.name]:
                    raise  # it wasn't we
                continue
            if before == self.counts[service.name]:
                return  # and it wasn't killed when it had just said that it was ready


class Worker:
    """Leads one life after another of images in a namespace that others use too, and looks whether all is there."""

    def __init__(
        self,
        number: int,
        client: Client,
        images: dict[str, Image],
        said: dict[str, str],
        chance: random.Random,
        out: Path,
    ) -> None:
        self.number, self.client, self._images, self._chance, self._out = number, client, images, chance, out
        self._said = said
        self.journal: list[str] = []
        self.lives = 0

    async def work(self, over: Callable[[], bool]) -> None:
        while not over():
            self.lives += 1
            await self._chance.choice([self._image, self._image, self._container, self._upload, self._delete])()

    # --------------------------------------------------------------------------------------------------------- lives

    async def _image(self) -> None:
        """Pulled under a lease, tagged, and looked at when the tag alone holds it."""
        name, image = self._chance.choice(list(self._images.items()))
        async with self._tagged(name, image) as tag:
            await self._check(image, f"{tag} after its lease")
            if self._chance.random() < 0.3:
                await self._ask(content.NODE_GC, content.Collect())
            await asyncio.sleep(self._chance.uniform(0, 0.6))
            await self._check(image, f"{tag} later")

    async def _container(self) -> None:
        """Of an image whose last tag goes while it lives: it has all of its layers, and so does who looks at them."""
        name, image = self._chance.choice(list(self._images.items()))
        id = f"w{self.number}c{self.lives}"
        output = self._out / id
        async with self._tagged(name, image) as tag:
            run = api.RunTask(
                id=id, image=tag, args=["/bin/sh", "-c", "cat /etc/layer*; read line; cat /etc/layer*"],
                stdio=Stdio(stdin=str(self._fifo(id)), stdout=f"file://{output}"),
            )  # fmt: skip
            async with self._open(self._out / f"{id}.in") as fifo:
                await self._operate(api.TASK_RUN, run)
                await self._delete_image(tag)
                await asyncio.sleep(self._chance.uniform(0, 0.6))
                await self._check_snapshots(image, f"below {id}")
                os.write(fifo, b"go on\n")
                exit = await self._ask(api.TASK_WAIT, api.ProcessRequest(container_id=id))
        said = output.read_text()
        assert (exit.exit_status, said) == (0, self._said[name] * 2), id
        await self._ask(api.CONTAINER_REMOVE, api.RemoveContainer(id=id, force=True), gone=(NotFound,))

    async def _upload(self) -> None:
        """Blobs of a client's own: under a lease, then under an image, and leading to one another by labels."""
        base = self._chance.randbytes(2000)
        leased = self.client.with_lease(f"w{self.number}u{self.lives}")
        await self._ask(content.LEASE_CREATE, content.CreateLease(id=leased.lease), gone=(AlreadyExists,))
        below = await self._write(leased, base, {})
        top = await self._write(leased, base + b"top", {"containerd.io/gc.ref.content.below": below})
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        await self._there({top, below}, "leased")
        name = f"w{self.number}u{self.lives}"
        create = content.CreateImage(name=name, target=Descriptor(media_type="text/plain", digest=top, size=2003))
        await self._ask(content.IMAGE_CREATE, create)
        await self._delete_lease(leased.lease)
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        await self._there({top, below}, "of an image")
        await self._delete_image(name)

    async def _delete(self) -> None:
        """What pulls have made, under its own name: nobody but they rely on that."""
        await self._delete_image(self._chance.choice(list(self._images)))

    # --------------------------------------------------------------------------------------------------------- steps

    @asynccontextmanager
    async def _tagged(self, name: str, image: Image) -> AsyncIterator[str]:
        """An image pulled, and tagged with a name of ours while a lease holds it."""
        tag = f"w{self.number}t{self.lives}"
        leased = self.client.with_lease(tag)
        await self._ask(content.LEASE_CREATE, content.CreateLease(id=tag))
        pulled = await self._operate(content.IMAGE_PULL, content.PullImage(name=name), leased)
        await self._check(image, f"{name} just pulled")
        await self._ask(content.IMAGE_CREATE, content.CreateImage(name=tag, target=pulled.target))
        await self._delete_lease(tag)
        yield tag
        await self._delete_image(tag)

    async def _write(self, client: Client, data: bytes, labels: dict[str, str]) -> str:
        request = content.WriteIngest(ref=digest_of(data), data=data, commit=True, labels=labels)
        return str((await self._ask(content.INGEST_WRITE, request, client)).committed)

    async def _delete_image(self, name: str) -> None:
        sync = self._chance.random() < 0.3
        await self._ask(content.IMAGE_DELETE, content.DeleteImage(name=name, sync=sync), gone=(NotFound,))

    async def _delete_lease(self, id: str) -> None:
        await self._ask(content.LEASE_DELETE, content.DeleteLease(id=id), gone=(NotFound,))

    async def _check(self, image: Image, what: str) -> None:
        await self._there({image.digest, *image.blobs}, what)
        for digest, (_, data) in image.blobs.items():
            if self._chance.random() < 0.2:
                chunks = await self._again(lambda digest=digest: self.client.collect(  # type: ignore[misc]
                    content.BLOB_READ, content.ReadBlob(digest=digest)
                ))  # fmt: skip
                assert b"".join(chunk.data for chunk in chunks) == data, f"{what}: {digest}"
        await self._check_snapshots(image, what)

    async def _there(self, digests: set[str], what: str) -> None:
        found = await self._again(lambda: self.client.collect(content.BLOB_LIST, content.ListBlobs()))
        missing = digests - {blob.digest for blob in found}
        assert not missing, f"{what}: {missing} of {len(digests)} are gone"

    async def _check_snapshots(self, image: Image, what: str) -> None:
        found = await self._again(lambda: self.client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()))
        missing = set(_chain(image)) - {one.key for one in found if one.kind == "committed"}
        assert not missing, f"{what}: snapshots {missing} are gone"

    def _fifo(self, id: str) -> Path:
        os.mkfifo(self._out / f"{id}.in")
        return self._out / f"{id}.in"

    @asynccontextmanager
    async def _open(self, fifo: Path) -> AsyncIterator[int]:
        fd = os.open(fifo, os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    # ---------------------------------------------------------------------------------------------------------- asked

    async def _ask(
        self, verb: Verb[Req, Rep], request: Req, client: Client | None = None, *,
        gone: tuple[type[ShoalError], ...] = (),
    ) -> Rep:  # fmt: skip
        """Asked, under one id, until it is answered; what `gone` names is an answer too, of something asked twice."""
        id = new_id()
        self.journal.append(f"{verb.name} {request!r:.200}")
        try:
            return await self._again(lambda: (client or self.client).call(verb, request, id=id, timeout=30))
        except gone:
            return verb.reply.model_construct()

    async def _operate(self, verb: OperationVerb[Req, Rep, Message], request: Req, client: Client | None = None) -> Rep:
        id = new_id()
        self.journal.append(f"{verb.name} {request!r:.200}")
        return await self._again(lambda: (client or self.client).operate(verb, request, id=id, timeout=60, patience=30))

    async def _again(self, ask: Callable[[], Awaitable[Rep]]) -> Rep:
        async with asyncio.timeout(_SECONDS):
            while True:
                try:
                    return await ask()
                except _TRANSIENT as error:
                    self.journal.append(f"  {type(error).__name__}: {error}")
                    await asyncio.sleep(0.1)


def _chain(image: Image) -> list[str]:
    from shoal_content.media import chain_ids

    return chain_ids(image.diff_ids)


def complaints(node: TestNode) -> list[str]:
    """What the services logged that nobody had foreseen."""
    return [
        f"{service.log.name}: {line}"
        for service in node.services
        for line in service.log.read_text().splitlines()
        if "Traceback" in line or '"level": "error"' in line
    ]


def on_disk(node: TestNode) -> dict[str, int]:
    """Everything under the node's root but its databases, and its blocks; a directory may have grown, and counts 0."""
    return {
        str(path.relative_to(node.root)): 0 if path.is_dir() and not path.is_symlink() else path.lstat().st_blocks
        for path in node.root.rglob("*")
        if not path.name.startswith("metadata.db")
    }


TABLES = {
    "content": (
        "blobs", "visible", "blob_references", "ingests", "images", "pulls", "holds", "leases", "lease_resources",
        "collection_kept",
    ),
    "snapshot": ("snapshots", "applies"),
    "runtime": ("containers", "tasks", "runs", "restarts", "collection_kept"),
}  # fmt: skip


def rows_left(node: TestNode) -> dict[str, int]:
    """Rows of what should be gone, and databases whose journal wasn't written back."""
    left = {}
    for service, tables in TABLES.items():
        path = node.root / service / "metadata.db"
        with sqlite3.connect(path) as database:
            for table in tables:
                (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
                left |= {f"{service}.{table}": count} if count else {}
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        wal = path.with_name("metadata.db-wal")
        left |= {str(wal): wal.stat().st_size} if wal.exists() and wal.stat().st_size else {}
    return left


async def remove_all(node: RuntimeNode, clients: list[Client]) -> None:
    for client in clients:
        for container in await client.collect(api.CONTAINER_LIST, api.ListContainers(specs=False)):
            with suppress(NotFound):
                await client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id=container.id, force=True))
        for image in await client.collect(content.IMAGE_LIST, content.ListImages()):
            await client.call(content.IMAGE_DELETE, content.DeleteImage(name=image.name, sync=False))
        for lease in await client.collect(content.LEASE_LIST, content.ListLeases()):
            await client.call(content.LEASE_DELETE, content.DeleteLease(id=lease.id))


@pytest.mark.timeout(240 + 3 * KILLS)
async def test_nothing_that_is_held_is_removed_and_everything_else_goes(
    tmp_path: Path, natsd: NatsServer, registry: Registry
) -> None:
    chance = random.Random(SEED)
    shared = busybox_layer()
    images: dict[str, Image] = {}
    said: dict[str, str] = {}
    for number in range(4):
        layers = [shared, Layer([directory("etc"), file("etc/layer0", b"0")])] if number < 3 else [shared]
        own = [Layer([file(f"etc/layer{n}", b"%d%d" % (number, n)), file(f"data{n}", chance.randbytes(60_000))])
               for n in range(1, 4)]  # fmt: skip
        image = Image.build([*layers, *own], config={"Cmd": ["/bin/sh"]})
        name = push(image, registry.host, f"app{number}")
        images[name], said[name] = image, ("0" if number < 3 else "") + "".join(f"{number}{n}" for n in range(1, 4))
    killer: Killer | None = None
    workers: list[Worker] = []
    try:
        async with runtime_node(tmp_path, natsd, copies=1, others=("snapshot", "content")) as started:
            node = started.node
            clients = [started.client, started.client.with_namespace(f"{started.namespace}-2")]
            before = on_disk(node)
            node.start("content", "snapshot")
            killer = Killer(node, random.Random(chance.random()))
            out = tmp_path / "out"
            out.mkdir()
            workers = [
                Worker(number, clients[number % 2], images, said, random.Random(chance.random()), out)
                for number in range(WORKERS)
            ]
            killing = asyncio.create_task(killer.run(KILLS))
            async with asyncio.TaskGroup() as group:
                for worker in workers:
                    group.create_task(worker.work(killing.done))
            await killing
            await remove_all(started, clients)
            async with asyncio.timeout(100):  # an unpacking that nobody asks after is undone within 45 s
                while True:
                    with suppress(Unavailable, Aborted, Cancelled):
                        await started.client.call(content.NODE_GC, content.Collect())
                    if on_disk(node) == before:
                        break
                    await asyncio.sleep(1)
        assert rows_left(node) == {}
        assert complaints(node) == []
    except BaseException as error:
        error.add_note(f"SHOAL_STORAGE_SEED={SEED}, killed {dict(killer.counts) if killer else 'nobody'}")
        for worker in workers:
            error.add_note(f"worker {worker.number} in {worker.client.namespace}: " + "\n  ".join(worker.journal[-14:]))
        raise
    log.info("killed %s in %d lives", dict(killer.counts), sum(worker.lives for worker in workers))
