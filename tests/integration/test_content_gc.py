"""Garbage collection over three services, and leases: what is held stays, and what isn't goes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.collection import Candidate, Epoch, LabelledSnapshot, Opened, Sweep, Swept
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal_bus.harness import Service
from shoal_bus.locks import Locks
from shoal_bus.message import Empty
from shoal_bus.types import Descriptor, Stdio

from tests.support.bundle import spec
from tests.support.content_proxy import proxy
from tests.support.images import Image, Layer, busybox_layer, digest_of, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.runtime import runtime_node

ROOT, EXPIRE, FLAT = "containerd.io/gc.root", "containerd.io/gc.expire", "containerd.io/gc.flat"
REF, BREF = "containerd.io/gc.ref.", "containerd.io/gc.bref."


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("snapshot", "content")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    made = Client(connection, node.name)
    await gc(made)  # behind the one that a start begins with
    return made


def seconds_from_now(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


async def write(client: Client, data: bytes, labels: dict[str, str] | None = None) -> str:
    request = content.WriteIngest(ref=digest_of(data), data=data, commit=True, labels=labels or {})
    committed = (await client.call(content.INGEST_WRITE, request)).committed
    assert committed is not None
    return committed


async def gc(client: Client) -> content.Collection:
    return await client.call(content.NODE_GC, content.Collect())


async def blobs(client: Client) -> set[str]:
    return {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}


async def snapshots(client: Client) -> set[str]:
    return {one.key for one in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}


async def lease(client: Client, id: str = "", **labels: str) -> str:
    named = {f"containerd.io/gc.{key}": value for key, value in labels.items()}
    return (await client.call(content.LEASE_CREATE, content.CreateLease(id=id, labels=named))).id


def files(node: TestNode) -> set[str]:
    root = node.root / "content"
    return {p.name for part in ("blobs", "ingests") for p in (root / part).rglob("*") if p.is_file()}


def layered(name: str, **options: object) -> Image:
    layers = [Layer([file(f"{name}{n}", name.encode() * 1000)]) for n in range(3)]
    return Image.build(layers, **options)  # type: ignore[arg-type]


async def prepare(client: Client, key: str, parent: str = "", **labels: str) -> None:
    await client.call(snapshot.SNAPSHOT_PREPARE, snapshot.PrepareSnapshot(key=key, parent=parent, labels=labels))


async def committed(client: Client, name: str, parent: str = "", labels: dict[str, str] | None = None) -> str:
    await prepare(client, f"{name}-active", parent)
    request = snapshot.CommitSnapshot(name=name, key=f"{name}-active", labels=labels or {})
    await client.call(snapshot.SNAPSHOT_COMMIT, request)
    return name


# ----------------------------------------------------------------------------------------------------------- by labels


async def test_labels_decide_what_of_the_blobs_goes(client: Client, node: TestNode) -> None:
    child = await write(client, b"child")
    root = await write(client, b"root", {ROOT: "now", f"{REF}content.0": child})
    named = await write(client, b"named/after", {f"{BREF}content": root})
    later = await write(client, b"later", {EXPIRE: seconds_from_now(60)})
    past = await write(client, b"past", {EXPIRE: seconds_from_now(-60)})
    loose = await write(client, b"loose")
    lost_child = await write(client, b"lost child")
    lost = await write(client, b"lost", {f"{REF}content": lost_child})
    misnamed = await write(client, b"misnamed")
    await write(client, b"odd", {ROOT: "", f"{REF}contents": misnamed})
    collection = await gc(client)
    gone = {past, loose, lost_child, lost, misnamed}
    assert {one.id for one in collection.removed} == gone
    assert (collection.counts, collection.bytes) == ({"content": 5}, sum(map(len, (
        b"past", b"loose", b"lost child", b"lost", b"misnamed"
    ))))  # fmt: skip
    assert await blobs(client) == {child, root, named, later, digest_of(b"odd")}
    assert len(files(node) - {"oci-layout"}) == 5
    assert (await gc(client)).counts == {}


async def test_a_blob_is_kept_in_the_namespace_that_needs_it_alone(client: Client, node: TestNode) -> None:
    other = client.with_namespace("other")
    await write(client, b"shared", {ROOT: "1"})
    await write(other, b"shared")
    assert [(one.namespace, one.type) for one in (await gc(client)).removed] == [("other", "content")]
    assert await blobs(client) == {digest_of(b"shared")}
    assert await blobs(other) == set()
    assert files(node) >= {digest_of(b"shared").partition(":")[2]}


async def test_documents_lead_where_they_say_themselves_unless_labels_say_otherwise(client: Client) -> None:
    image = layered("x")
    wrong = {"mediaType": "application/octet-stream", "digest": image.digest, "size": len(image.manifest)}
    index = json.dumps({"schemaVersion": 2, "manifests": [wrong]}).encode()
    await write(client, index)
    await write(client, image.manifest)
    for _, data in image.blobs.values():
        await write(client, data)
    # A descriptor's media type, the image's and the entry's, is what somebody claims.
    target = Descriptor(media_type="text/plain", digest=digest_of(index), size=len(index))
    await client.call(content.IMAGE_CREATE, content.CreateImage(name="x", target=target))
    assert (await gc(client)).counts == {}
    assert await blobs(client) == {digest_of(index), image.digest, *image.blobs}
    config = digest_of(json.dumps(image.config).encode())
    await client.call(content.BLOB_DELETE, content.BlobRequest(digest=image.digest))
    await write(client, image.manifest, {f"{REF}content.config": config})
    await gc(client)
    assert await blobs(client) == {digest_of(index), image.digest, config}
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name="x"))
    assert await blobs(client) == set()


async def test_an_image_expires_unless_something_refers_to_it(client: Client, connection: Connection) -> None:
    target = Descriptor(
        media_type="text/plain", digest=await write(client, b"t", {EXPIRE: seconds_from_now(3)}), size=1
    )
    for name, labels in (
        ("short", {EXPIRE: seconds_from_now(1)}),
        ("kept", {EXPIRE: seconds_from_now(-1)}),
        ("ever", {}),
    ):
        await client.call(content.IMAGE_CREATE, content.CreateImage(name=name, target=target, labels=labels))
    await client.call(content.IMAGE_UPDATE, content.UpdateImage(
        name="ever", labels={f"{REF}image": "kept"}, fields=[f"labels.{REF}image"]
    ))  # fmt: skip
    async with asyncio.timeout(10):  # nobody asks for it: it is due
        while len(await client.collect(content.IMAGE_LIST, content.ListImages())) > 2:
            await asyncio.sleep(0.1)
    assert {one.name for one in await client.collect(content.IMAGE_LIST, content.ListImages())} == {"kept", "ever"}
    assert ("/images/delete", "short") in await topics(connection)


async def topics(connection: Connection) -> list[tuple[str, str]]:
    await asyncio.sleep(0.3)
    async with aclosing(read_events(connection, start=1, follow=False)) as events:  # type: ignore[type-var]
        return [(received.event.topic, received.event.id) async for received in events]


# -------------------------------------------------------------------------------------------------------------- leases


async def test_a_lease_holds_what_is_made_under_it(client: Client, node: TestNode) -> None:
    id = await lease(client, "mine")
    leased = client.with_lease(id)
    with pytest.raises(NotFound, match="nowhere"):
        await write(client.with_lease("nowhere"), b"x")
    blob = await write(leased, b"blob")
    unfinished = content.WriteIngest(ref="unfinished", data=b"a", expected=digest_of(b"abc"))
    await leased.call(content.INGEST_WRITE, unfinished)
    await prepare(leased, "active")
    name = await committed(leased, "layer")
    target = Descriptor(media_type="text/plain", digest=await write(client, b"target"), size=6)
    await leased.call(content.IMAGE_CREATE, content.CreateImage(
        name="image", target=target, labels={EXPIRE: seconds_from_now(-1)}
    ))  # fmt: skip
    held = await client.collect(content.LEASE_RESOURCES, content.LeaseRequest(id=id))
    assert {(one.type, one.id) for one in held} == {
        ("content", blob), ("images", "image"), ("ingests", "unfinished"), ("snapshots/overlayfs", "active"),
        ("snapshots/overlayfs", "layer"), ("snapshots/overlayfs", "layer-active"),
    }  # fmt: skip
    assert (await gc(client)).counts == {}
    assert await snapshots(client) == {"active", name}
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=id, sync=True))
    assert await snapshots(client) == set()
    assert await blobs(client) == set()
    assert await client.collect(content.INGEST_LIST, content.ListBlobs()) == []
    assert await client.collect(content.IMAGE_LIST, content.ListImages()) == []
    assert files(node) == set()
    assert list((node.root / "snapshot" / "overlayfs" / "snapshots").iterdir()) == []


async def test_leases_are_made_listed_changed_and_removed(client: Client) -> None:
    with pytest.raises(InvalidArgument):
        await client.call(content.LEASE_CREATE, content.CreateLease.model_construct(id="a\nb"))
    made = await client.call(content.LEASE_CREATE, content.CreateLease(labels={"who": "me"}))
    assert made.id
    await lease(client, "other one/ü")
    with pytest.raises(AlreadyExists):
        await lease(client, made.id)
    for filters, found in ([], 2), ([f"id=={made.id}"], 1), (["labels.who==me"], 1), (["labels.who==you"], 0):
        assert len(await client.collect(content.LEASE_LIST, content.ListLeases(filters=filters))) == found
    for wrong in {"type": "content", "id": "x"}, {"type": "tasks", "id": "x"}, {"type": "snapshots/", "id": "x"}:
        with pytest.raises(InvalidArgument):
            await client.call(content.LEASE_ADD, content.ChangeLease.model_construct(lease=made.id, **wrong))
    blob = await write(client.with_lease("other one/ü"), b"held")
    change = content.ChangeLease(lease=made.id, type="content", id=blob)
    await client.call(content.LEASE_ADD, change)
    await client.call(content.LEASE_DELETE, content.DeleteLease(id="other one/ü", sync=True))
    assert await blobs(client) == {blob}
    await client.call(content.LEASE_REMOVE, change)
    await gc(client)
    assert await blobs(client) == set()
    assert (await client.call(content.LEASE_GET, content.LeaseRequest(id=made.id))).labels == {"who": "me"}
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=made.id))
    for verb, request in (
        (content.LEASE_GET, content.LeaseRequest(id=made.id)), (content.LEASE_ADD, change),
        (content.LEASE_REMOVE, change), (content.LEASE_DELETE, content.DeleteLease(id=made.id)),
    ):  # fmt: skip
        with pytest.raises(NotFound):
            await client.call(verb, request)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        await client.collect(content.LEASE_RESOURCES, content.LeaseRequest(id=made.id))


async def test_a_lease_ends_by_the_services_clock_and_nobody_needs_to_ask(client: Client) -> None:
    soon, later = (
        await lease(client, "soon", expire=seconds_from_now(1)),
        await lease(client, expire=seconds_from_now(60)),
    )
    never = await lease(client, expire="whenever")
    gone, kept = await write(client.with_lease(soon), b"gone"), await write(client.with_lease(later), b"kept")
    await client.with_lease(soon).call(content.INGEST_WRITE, content.WriteIngest(ref="gone", data=b"a"))
    assert await blobs(client) == {gone, kept}
    async with asyncio.timeout(10):
        while await blobs(client) != {kept} or await client.collect(content.INGEST_LIST, content.ListBlobs()):
            await asyncio.sleep(0.1)
    left = {one.id for one in await client.collect(content.LEASE_LIST, content.ListLeases())}
    assert left == {later, never}


async def test_a_flat_lease_holds_no_more_than_it_names(client: Client) -> None:
    image = layered("flat")
    for _, data in image.blobs.values():
        await write(client, data)
    flat = client.with_lease(await lease(client, "flat", flat="1"))
    await write(flat, image.manifest)
    top = await write(client, b"top", {f"{REF}content.a": await write(client, b"below")})
    target = Descriptor(media_type="text/plain", digest=top, size=3)
    labels = {EXPIRE: seconds_from_now(-1)}
    await flat.call(content.IMAGE_CREATE, content.CreateImage(name="image", target=target, labels=labels))
    await gc(client)
    assert await blobs(client) == {image.digest, top}
    assert len(await client.collect(content.IMAGE_LIST, content.ListImages())) == 1


async def test_a_blob_that_is_there_already_is_leased_too(client: Client) -> None:
    blob = await write(client, b"there")
    leased = client.with_lease(await lease(client))
    for request in (
        content.WriteIngest(ref="1", expected=blob), content.WriteIngest(ref="2", data=b"there", commit=True),
    ):  # fmt: skip
        with pytest.raises(AlreadyExists):
            await leased.call(content.INGEST_WRITE, request)
        await gc(client)
        assert await blobs(client) == {blob}
        await client.call(content.LEASE_REMOVE, content.ChangeLease(lease=leased.lease, type="content", id=blob))
    await gc(client)
    assert await blobs(client) == set()


# --------------------------------------------------------------------------------------------------------------- pulls


async def test_a_pull_labels_what_it_brings_as_containerd_does(client: Client, registry: Registry) -> None:
    image = layered("labels")
    name = push(Image.index([image, layered("arm", architecture="arm64")]), registry.host, "team/labels")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name))
    source = {f"containerd.io/distribution.source.{registry.host}": "team/labels"}

    async def labels(digest: str) -> dict[str, str]:
        return (await client.call(content.BLOB_INFO, content.BlobRequest(digest=digest))).labels

    assert set(await labels(resolved.image.target.digest)) == {f"{REF}content.m.0", f"{REF}content.m.1", *source}
    config = resolved.config_descriptor.digest
    assert await labels(image.digest) == source | {f"{REF}content.config": config} | {
        f"{REF}content.l.{at}": digest for at, digest in enumerate(image.layers)
    }
    assert await labels(config) == source | {f"{REF}snapshot.overlayfs": resolved.chain_id}
    assert await labels(image.layers[0]) == source
    other = push(image, registry.host, "team/other")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=other))
    assert (await labels(image.layers[0]))[
        f"containerd.io/distribution.source.{registry.host}"
    ] == "team/labels,team/other"


async def test_a_tag_holds_what_the_original_did(client: Client, registry: Registry, node: TestNode) -> None:
    name = push(layered("tagged"), registry.host, "tagged")
    pulled = await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    whole = await blobs(client), await snapshots(client)
    await client.call(content.IMAGE_CREATE, content.CreateImage(name="mine", target=pulled.target))
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert (await blobs(client), await snapshots(client)) == whole
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name="mine"))
    assert (await blobs(client), await snapshots(client), files(node)) == (set(), set(), set())


async def test_pulls_of_several_platforms_under_one_name_keep_one_another(client: Client, registry: Registry) -> None:
    images = [layered(one, architecture=one) for one in ("amd64", "arm64")]
    name = push(Image.index(images), registry.host, "platforms")
    for image in images:
        platform = f"linux/{image.config['architecture']}"
        await client.operate(content.IMAGE_PULL, content.PullImage(name=name, platform=platform))
    assert len(await snapshots(client)) == 6
    assert (await gc(client)).counts == {}
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name, snapshotter=""))
    assert (await gc(client)).counts == {}
    assert len(await snapshots(client)) == 6
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await snapshots(client) == set()


async def test_a_pull_under_a_lease_outlives_its_image(client: Client, registry: Registry) -> None:
    name = push(layered("leased"), registry.host, "leased")
    leased = client.with_lease(await lease(client, "l"))
    await leased.operate(content.IMAGE_PULL, content.PullImage(name=name))
    whole = await blobs(client), await snapshots(client)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert (await blobs(client), await snapshots(client)) == whole
    await client.call(content.LEASE_DELETE, content.DeleteLease(id="l", sync=True))
    assert (await blobs(client), await snapshots(client)) == (set(), set())
    with pytest.raises(NotFound, match="lease"):
        await leased.operate(content.IMAGE_PULL, content.PullImage(name=name))


async def test_what_a_client_has_of_a_failed_pull_is_his_as_far_as_he_leased_it(
    client: Client, registry: Registry
) -> None:
    image = layered("failing")
    push(image, registry.host, "failing")
    first, second = image.layers[:2]
    async with proxy(registry.host) as between:
        between.pause = 0.05
        request = content.PullImage(name=f"{between.host}/failing", snapshotter="", max_concurrent_downloads=1)
        pulling = asyncio.create_task(client.operate(content.IMAGE_PULL, request))
        while not between.blob_requests(first):
            await asyncio.sleep(0.01)
        await write(client.with_lease(await lease(client)), image.blobs[second][1])
        pulling.cancel()
        with pytest.raises((asyncio.CancelledError, ShoalError)):
            await pulling
    async with asyncio.timeout(10):
        while await blobs(client) != {second}:
            await asyncio.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------- snapshots


async def test_snapshots_stay_by_label_lease_child_and_reference(client: Client) -> None:
    base = await committed(client, "base")
    await committed(client, "root", base, {ROOT: "1"})
    await committed(client, "loose", base)
    await committed(client, "held")
    await committed(client, "referred")
    await write(
        client, b"config", {ROOT: "1", f"{REF}snapshot.overlayfs/more": "referred", f"{REF}snapshot.native": "x"}
    )
    id = await lease(client)
    change = content.ChangeLease(lease=id, type="snapshots/overlayfs", id="held")
    await client.call(content.LEASE_ADD, change)
    await prepare(client, "just-made", "loose")
    assert (await gc(client)).counts == {}
    await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="just-made"))
    assert {one.id for one in (await gc(client)).removed} == {"loose"}
    await client.call(content.LEASE_REMOVE, change)
    unlabel = snapshot.UpdateSnapshot(key="root", labels={}, fields=[f"labels.{ROOT}"])
    await client.call(snapshot.SNAPSHOT_UPDATE, unlabel)
    assert {one.id for one in (await gc(client)).removed} == {"held", "root", "base"}
    assert await snapshots(client) == {"referred"}


async def test_a_snapshots_labels_hold_blobs_as_long_as_something_holds_it(client: Client) -> None:
    blob = await write(client, b"of a snapshot")
    await committed(client, "one", labels={f"{REF}content": blob})
    id = await lease(client)
    change = content.ChangeLease(lease=id, type="snapshots/overlayfs", id="one")
    await client.call(content.LEASE_ADD, change)
    await committed(client, "companion", labels={f"{BREF}snapshot.overlayfs": "one"})
    assert (await gc(client)).counts == {}
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=id, sync=True))
    assert (await blobs(client), await snapshots(client)) == (set(), set())


async def test_what_is_looked_at_within_an_epoch_is_not_swept(client: Client) -> None:
    for name in ("looked-at", "relabelled", "left-alone", "parent"):
        await committed(client, name)
    epoch = Epoch(token="t1")
    assert "overlayfs" in (await client.call(snapshot.GC_OPEN, epoch)).snapshotters
    await committed(client, "made-since")
    await client.call(snapshot.SNAPSHOT_STAT, snapshot.SnapshotRequest(key="looked-at"))
    await client.call(snapshot.SNAPSHOT_UPDATE, snapshot.UpdateSnapshot(key="relabelled", labels={"a": "b"}))
    offered = await client.collect(snapshot.GC_CANDIDATES, epoch)
    assert {key for one in offered for key in one.keys} == {"left-alone", "parent"}
    await prepare(client, "child", "parent")
    names = ["looked-at", "relabelled", "left-alone", "parent", "made-since", "never-there"]
    sweep = Sweep(token="t1", namespace=client.namespace, snapshotter="overlayfs", keys=names)
    assert (await client.call(snapshot.GC_SWEEP, sweep)).keys == ["left-alone"]
    await client.call(snapshot.GC_OPEN, Epoch(token="t2"))
    for verb in (snapshot.GC_CANDIDATES, snapshot.GC_LABELLED):
        with pytest.raises(Aborted):
            await client.collect(verb, epoch)  # type: ignore[type-var]
    with pytest.raises(Aborted):
        await client.call(snapshot.GC_SWEEP, sweep)
    await client.call(snapshot.GC_CLOSE, epoch)  # of another one: it changes nothing
    sweep = sweep.model_copy(update={"token": "t2"})
    assert (await client.call(snapshot.GC_SWEEP, sweep)).keys == ["looked-at", "relabelled", "made-since"]


async def test_what_is_leased_while_snapshots_are_swept_is_left(client: Client, node: TestNode) -> None:
    for name in ("leased", "written-too-late"):
        await committed(client, name)
    id = await lease(client)
    epoch = Epoch(token="t")
    await client.call(snapshot.GC_OPEN, epoch)
    with closing(sqlite3.connect(node.root / "content" / "metadata.db")) as database, database:
        database.execute("UPDATE collection SET token = 't', open = 2")  # as a collector does that has just marked
    await client.call(content.LEASE_ADD, content.ChangeLease(lease=id, type="snapshots/overlayfs", id="leased"))
    await client.call(content.LEASE_ADD, content.ChangeLease(lease=id, type="snapshots/overlayfs", id="nowhere"))
    keys = ["leased", "written-too-late"]
    sweep = Sweep(token="t", namespace=client.namespace, snapshotter="overlayfs", keys=keys)
    assert (await client.call(snapshot.GC_SWEEP, sweep)).keys == ["written-too-late"]


async def test_what_a_removal_uncovers_goes_soon_after_it(client: Client, registry: Registry) -> None:
    name = push(layered("covered"), registry.host, "covered")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    top = (await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name))).chain_id
    await prepare(client, "on-top", top)
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert len(await snapshots(client)) == 4
    await client.call(snapshot.SNAPSHOT_REMOVE, snapshot.SnapshotRequest(key="on-top"))
    async with asyncio.timeout(10):  # nobody asks for it
        while await snapshots(client):
            await asyncio.sleep(0.1)


async def test_a_long_chain_goes_in_one_collection(client: Client) -> None:
    parent = ""
    for number in range(40):
        parent = await committed(client, f"layer{number}", parent)
    branch = await committed(client, "branch", "layer19")
    collection = await gc(client)
    assert collection.counts == {"snapshots/overlayfs": 41}
    assert branch in {one.id for one in collection.removed}
    assert await snapshots(client) == set()


# -------------------------------------------------------------------------------------------------- the other services


@pytest.fixture
async def whole(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[Client, TestNode]]:
    async with runtime_node(tmp_path, natsd, others=("snapshot", "content")) as started:
        yield started.client, started.node


async def test_containers_hold_what_they_were_made_of(whole: tuple[Client, TestNode], registry: Registry) -> None:
    client, node = whole
    image = Image.build([busybox_layer(), *(Layer([file(f"etc/{n}")]) for n in range(2))], config={"Cmd": ["/bin/sh"]})
    name = push(image, registry.host, "held")
    await client.operate(content.IMAGE_PULL, content.PullImage(name=name))
    run = api.RunTask(id="web", image=name, args=["sleep", "600"], stdio=Stdio())
    await client.operate(api.TASK_RUN, run, timeout=60)
    blob = await write(client, b"of a container")
    companion = await write(client, b"companion", {f"{BREF}container": "web"})
    update = api.UpdateContainer(id="web", labels={f"{REF}content.x": blob}, fields=[f"labels.{REF}content.x"])
    await client.call(api.CONTAINER_UPDATE, update)
    leased = client.with_lease(await lease(client))
    top = (await client.call(snapshot.SNAPSHOT_STAT, snapshot.SnapshotRequest(key="web"))).parent
    await prepare(leased, "other", top)
    await client.call(
        api.CONTAINER_CREATE, api.CreateContainer(id="other", snapshot_key="other", spec=spec(["/bin/sh"]))
    )
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=leased.lease, sync=True))
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
    assert await blobs(client) == {blob, companion}
    assert len(await snapshots(client)) == 3 + 2
    await client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id="web", force=True))
    assert (await gc(client)).counts == {"content": 2}
    assert len(await snapshots(client)) == 3 + 1
    await client.call(api.CONTAINER_DELETE, api.ContainerRequest(id="other"))
    assert (await gc(client)).counts == {"snapshots/overlayfs": 4}
    assert await snapshots(client) == set()
    await asyncio.to_thread(node.of("runtime").kill)


async def test_nothing_is_swept_while_a_service_is_away(whole: tuple[Client, TestNode], connection: Connection) -> None:
    client, node = whole
    assert (await gc(client)).counts == {}
    blob = await write(client, b"garbage")
    await committed(client, "garbage")
    for name in ("runtime", "snapshot"):
        await asyncio.to_thread(node.of(name).kill)
        with pytest.raises(Unavailable, match=name):
            await gc(client)
        assert await blobs(client) == {blob}
        await asyncio.to_thread(node.of(name).start)
    async with asyncio.timeout(10):  # what is owed is made up for, whoever asks
        while await blobs(client) or await snapshots(client):
            await asyncio.sleep(0.1)
    events = await topics(connection)
    assert [one for one in events if one[1] in (blob, "garbage")][-2:] == [
        ("/content/delete", blob), ("/snapshot/remove", "garbage")
    ]  # fmt: skip


async def test_a_collection_that_a_dead_copy_owed_is_made_by_the_next(client: Client, node: TestNode) -> None:
    target = Descriptor(media_type="text/plain", digest=await write(client, b"owed"), size=4)
    await client.call(content.IMAGE_CREATE, content.CreateImage(name="owed", target=target))
    await asyncio.to_thread(node.of("snapshot").kill)  # it has been here: without it nothing is swept
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name="owed"))
    assert len(await blobs(client)) == 1
    await asyncio.to_thread(node.of("content").kill)
    await asyncio.to_thread(node.of("snapshot").start)
    await asyncio.to_thread(node.of("content").start)
    async with asyncio.timeout(10):
        while await blobs(client):
            await asyncio.sleep(0.1)


async def test_two_copies_collect_one_at_a_time(client: Client, node: TestNode) -> None:
    node.start("content")
    written = [await write(client, b"%d" % number) for number in range(40)]
    collections = await asyncio.gather(*(gc(client) for _ in range(8)))
    removed = [one.id for collection in collections for one in collection.removed]
    assert sorted(removed) == sorted(written)


class _Foreign:
    """A snapshotter that is a process of its own, with one snapshot that it offers."""

    def __init__(self) -> None:
        self.swept: list[str] = []
        self.there = ["foreign"]

    async def open(self, ctx: Context, request: Epoch) -> Opened:
        return Opened(snapshotters=["foreign"])

    async def close(self, ctx: Context, request: Epoch) -> Empty:
        return Empty()

    async def labelled(self, ctx: Context, request: Epoch) -> AsyncIterator[LabelledSnapshot]:
        for item in ():
            yield item

    async def candidates(self, ctx: Context, request: Epoch) -> AsyncIterator[Candidate]:
        for key in self.there:
            yield Candidate(namespace="default", snapshotter="foreign", keys=[key])

    async def sweep(self, ctx: Context, request: Sweep) -> Swept:
        self.swept += request.keys
        self.there.clear()
        return Swept(keys=request.keys)


async def test_a_foreign_snapshotter_takes_part_once_it_answers(
    client: Client, connection: Connection, node: TestNode, tmp_path: Path
) -> None:
    id = await lease(client)
    change = content.ChangeLease(lease=id, type="snapshots/foreign", id="foreign")
    await client.call(content.LEASE_ADD, change)
    assert (await gc(client)).counts == {}
    foreign, locks = _Foreign(), Locks(tmp_path / "foreign.locks")
    database = Database(tmp_path / "foreign.db", node.name)
    service = Service("snapshot", connection, node=node.name, database=database, locks=locks)
    service.handle(snapshot.GC_OPEN.on("foreign"), foreign.open, lock=lambda _: "gc")
    service.handle(snapshot.GC_CLOSE.on("foreign"), foreign.close, lock=lambda _: "gc")
    service.handle(snapshot.GC_SWEEP.on("foreign"), foreign.sweep, lock=lambda _: "gc")
    service.stream(snapshot.GC_LABELLED.on("foreign"), foreign.labelled)
    service.stream(snapshot.GC_CANDIDATES.on("foreign"), foreign.candidates)
    await client.call(content.LEASE_REMOVE, change)
    assert (await gc(client)).counts == {}  # it doesn't answer yet
    await service.start()
    try:
        assert (await gc(client)).counts == {"snapshots/foreign": 1}
        assert foreign.swept == ["foreign"]
    finally:
        await service.drain()
        locks.close()
        database.close()


async def test_what_is_written_under_no_lease_goes_when_a_collection_is_asked_for_and_no_sooner(client: Client) -> None:
    held = await lease(client, "held")
    await client.with_lease(held).call(
        content.INGEST_WRITE, content.WriteIngest(ref="leased", data=b"leased", commit=True)
    )
    bare = await write(client, b"bare")
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=held))
    async with asyncio.timeout(10):  # unasked: what the lease held is gone, and no more
        while await blobs(client) != {bare}:
            await asyncio.sleep(0.1)
    last = await lease(client)
    await client.call(content.LEASE_DELETE, content.DeleteLease(id=last, sync=True))
    assert await blobs(client) == set()
