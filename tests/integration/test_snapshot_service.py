"""The snapshot service on a bus: its verbs, its events, its errors, and two copies of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShoalError,
)
from shoal_bus.types import Descriptor

from tests.support import images
from tests.support.images import Layer, directory, file, symlink, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import mounted, write_blob


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def unpack(client: Client, directory: Path, layer: Layer, name: str, parent: str = "") -> api.SnapshotInfo:
    path, blob, diff_id = write_blob(directory, layer)
    request = api.UnpackLayer(name=name, parent=parent, descriptor=blob, path=str(path), diff_id=diff_id)
    return await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)


async def keys(client: Client) -> list[str]:
    return [s.key for s in await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())]


def directories(node: TestNode) -> set[str]:
    root = node.root / "snapshot" / "overlayfs"
    return {path.name for path in (root / "snapshots").iterdir()} | {path.name for path in (root / "trash").iterdir()}


async def swept(node: TestNode, count: int) -> None:
    """Returns once what was removed has been deleted, too."""
    async with asyncio.timeout(15):
        while len(directories(node)) != count:
            await asyncio.sleep(0.02)


async def events(client: Client, last: str) -> list[tuple[str, str]]:
    """Topics and ids so far, up to the first event of topic `last`."""
    async with asyncio.timeout(20):
        while True:
            found = [(r.event.topic, r.event.id) async for r in read_events(client.connection, start=1, follow=False)]
            if any(topic == last for topic, _ in found):
                return found
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("place", ["blobs/sha256", "ingests", "quarantine", ".", "claims/..", "../elsewhere"])
async def test_a_blob_is_read_only_where_content_has_named_it(place: str, client: Client, tmp_path: Path) -> None:
    """To know a digest, and so where a blob lies, gives nobody its bytes."""
    path, blob, diff_id = write_blob(tmp_path, Layer([file("secret")]))
    guessed = path.parent.parent / place / path.name
    guessed.parent.mkdir(parents=True, exist_ok=True)
    path.rename(guessed)
    with pytest.raises(NotFound) as refused:
        await unpack_from(client, guessed, blob, diff_id)
    path.parent.mkdir(exist_ok=True)
    guessed.rename(path)
    assert str(refused.value).count(blob.digest) <= 1
    assert (await unpack_from(client, path, blob, diff_id)).key == "named"


async def unpack_from(client: Client, path: Path, blob: Descriptor, diff_id: str) -> api.SnapshotInfo:
    request = api.UnpackLayer(name="named", descriptor=blob, path=str(path), diff_id=diff_id)
    return await client.operate(api.SNAPSHOT_UNPACK, request, timeout=30)


async def test_an_image_is_unpacked_layer_by_layer_and_mounted(node: TestNode, client: Client, tmp_path: Path) -> None:
    one = await unpack(client, tmp_path, images.busybox_layer(), "one")
    assert (one.kind, one.parent) == ("committed", "")
    await unpack(client, tmp_path, Layer([whiteout("etc/passwd"), file("etc/motd", b"hi")], "zstd"), "two", "one")
    prepared = await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="c", parent="two", labels={"a": "b"}))
    with mounted(prepared.mounts, tmp_path) as root:
        assert sorted(p.name for p in (root / "etc").iterdir()) == ["group", "motd"]
        assert (root / "bin/busybox").stat().st_mode & 0o7777 == 0o755
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    usage = await client.call(api.SNAPSHOT_USAGE, api.SnapshotRequest(key="two"))
    assert 3 <= usage.inodes <= 5
    await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key="c"))
    told = [(topic, id) for topic, id in await events(client, "/snapshot/remove") if not id.startswith("extract-")]
    assert told == [("/snapshot/prepare", "c"), ("/snapshot/remove", "c")]
    await swept(node, 2)


async def test_an_unpacked_snapshot_is_the_answer(client: Client, tmp_path: Path) -> None:
    layer = Layer([file("f", b"1")])
    first = await unpack(client, tmp_path, layer, "one")
    path, blob, diff_id = write_blob(tmp_path, layer)
    path.unlink()
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    assert await client.operate(api.SNAPSHOT_UNPACK, request) == first


async def test_progress_tells_how_much_of_the_layer_was_read(client: Client, tmp_path: Path) -> None:
    layer = Layer([file(f"f{number}", bytes(2_000)) for number in range(12_000)], "none")
    path, blob, diff_id = write_blob(tmp_path, layer)
    told: list[api.ApplyProgress] = []
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(api.SNAPSHOT_UNPACK, request, on_progress=told.append, timeout=60)
    assert told
    assert all(0 < p.offset <= p.total == blob.size for p in told)
    assert [p.offset for p in told] == sorted(p.offset for p in told)


async def test_a_layer_that_fails_leaves_nothing(node: TestNode, client: Client, tmp_path: Path) -> None:
    path, blob, diff_id = write_blob(tmp_path, Layer([file(f"f{n}", bytes(5_000)) for n in range(500)], "none"))
    other = images.digest_of(b"other")
    whole = path.read_bytes()
    good = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)

    async def fails(error: type[ShoalError], **changed: object) -> None:
        with pytest.raises(error) as raised:
            await client.operate(api.SNAPSHOT_UNPACK, good.model_copy(update=changed), timeout=60)
        assert "\n" not in str(raised.value)
        assert await keys(client) == []
        await swept(node, 0)

    await fails(FailedPrecondition, diff_id=other)
    await fails(DataLoss, descriptor=blob.model_copy(update={"digest": other}))
    await fails(NotFound, path=str(tmp_path / "nothing"))
    await fails(NotFound, parent="nothing")
    path.write_bytes(whole[: len(whole) // 2])
    await fails(DataLoss)
    path.write_bytes(whole)
    assert (await client.operate(api.SNAPSHOT_UNPACK, good, timeout=60)).key == "one"


async def test_an_unpack_that_nobody_wants_is_undone(node: TestNode, client: Client, tmp_path: Path) -> None:
    path, blob, diff_id = write_blob(tmp_path, Layer([file(f"f{n}", b"x") for n in range(60_000)], "none"))
    request = api.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    unpacking = asyncio.create_task(client.operate(api.SNAPSHOT_UNPACK, request, timeout=60))
    async with asyncio.timeout(10):
        while not directories(node):
            await asyncio.sleep(0.01)
    unpacking.cancel()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await unpacking
    await swept(node, 0)
    assert await keys(client) == []


async def test_a_layer_is_applied_to_a_prepared_snapshot(node: TestNode, client: Client, tmp_path: Path) -> None:
    await unpack(client, tmp_path, Layer([directory("d"), file("d/a"), file("d/b")]), "one")
    prepared = await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="c", parent="one"))
    path, blob, diff_id = write_blob(tmp_path, Layer([whiteout("d/a"), file("d/c")]))
    request = api.ApplyLayer(descriptor=blob, path=str(path), mounts=prepared.mounts)
    applied = await client.operate(api.DIFF_APPLY, request)
    assert (applied.descriptor.digest, applied.entries) == (diff_id, 2)
    with mounted(prepared.mounts, tmp_path) as root:
        assert sorted(p.name for p in (root / "d").iterdir()) == ["b", "c"]


async def test_a_failed_apply_empties_what_was_empty(node: TestNode, client: Client, tmp_path: Path) -> None:
    mounts = (await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="c"))).mounts
    path, blob, _ = write_blob(tmp_path, Layer([file("a"), directory("d"), file("d/x")]))
    wrong = images.digest_of(b"other")
    request = api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts, diff_id=wrong)
    with pytest.raises(FailedPrecondition):
        await client.operate(api.DIFF_APPLY, request)
    assert list(Path(mounts[0].source).iterdir()) == []
    await client.operate(api.DIFF_APPLY, request.model_copy(update={"diff_id": None}))
    await client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(key="c", name="one"))


@pytest.mark.parametrize("on", ["overlayfs", "native"])
async def test_a_snapshot_with_a_part_of_a_layer_is_looked_at_and_removed_and_nothing_else(
    node: TestNode, client: Client, tmp_path: Path, on: str
) -> None:
    prepare, commit, remove = (verb.on(on) for verb in (api.SNAPSHOT_PREPARE, api.SNAPSHOT_COMMIT, api.SNAPSHOT_REMOVE))
    base, base_blob, _ = write_blob(tmp_path, Layer([file("base")]))
    path, blob, _ = write_blob(tmp_path, Layer([file("a"), file("base", b"changed")]))

    async def prepared(key: str) -> api.ApplyLayer:
        """What applies the second layer to a new snapshot that has the first one."""
        mounts = (await client.call(prepare, api.PrepareSnapshot(key=key))).mounts
        await client.operate(api.DIFF_APPLY, api.ApplyLayer(descriptor=base_blob, path=str(base), mounts=mounts))
        return api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts)

    request = await prepared("broken")
    nowhere = request.model_copy(update={"path": f"{path}x"})
    with pytest.raises(NotFound):
        await client.operate(api.DIFF_APPLY, nowhere)  # changes nothing, and spoils nothing
    with pytest.raises(FailedPrecondition, match="diff ID"):
        await client.operate(api.DIFF_APPLY, request.model_copy(update={"diff_id": images.digest_of(b"other")}))
    for verb, again in ((api.DIFF_APPLY, request), (commit, api.CommitSnapshot(key="broken", name="one"))):
        asked = client.operate(verb, again) if verb is api.DIFF_APPLY else client.call(verb, again)  # type: ignore[arg-type,type-var]
        with pytest.raises(FailedPrecondition, match="snapshot broken: holds only a part of a layer") as error:
            await asked
        assert error.value.hint == "remove it, and prepare another one"
    with mounted(request.mounts, tmp_path) as root:
        assert (root / "a").exists()
    await client.call(remove, api.SnapshotRequest(key="broken"))
    await client.operate(api.DIFF_APPLY, await prepared("broken"))
    await client.call(commit, api.CommitSnapshot(key="broken", name="one"))
    view = await client.call(api.SNAPSHOT_VIEW.on(on), api.PrepareSnapshot(key="look", parent="one"))
    with mounted(view.mounts, tmp_path) as root:
        assert {p.name: p.read_bytes() for p in root.iterdir()} == {"a": b"", "base": b"changed"}


async def test_layers_go_into_active_snapshots_of_the_namespace_alone(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    await unpack(client, tmp_path, Layer([file("f")]), "one")
    path, blob, _ = write_blob(tmp_path, Layer([symlink("x", "/")]))
    mine = (await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key="c"))).mounts
    view = (await client.call(api.SNAPSHOT_VIEW, api.PrepareSnapshot(key="v", parent="one"))).mounts
    committed = [view[0].model_copy(update={"options": ["rw", "rbind"]})]
    elsewhere = [mine[0].model_copy(update={"source": str(tmp_path)})]
    around = [mine[0].model_copy(update={"source": f"{mine[0].source}/../../1/fs"})]
    before = {p.name for p in tmp_path.iterdir()}
    for asking, mounts, error in (
        (client, view, InvalidArgument),
        (client, [], InvalidArgument),
        (client, committed, FailedPrecondition),
        (client, elsewhere, NotFound),
        (client, around, NotFound),
        (client.with_namespace("other"), mine, NotFound),
    ):
        with pytest.raises(error):
            await asking.operate(api.DIFF_APPLY, api.ApplyLayer(descriptor=blob, path=str(path), mounts=mounts))
    assert {p.name for p in tmp_path.iterdir()} == before
    assert list(Path(mine[0].source).iterdir()) == []


async def test_two_copies_share_the_work(node: TestNode, client: Client, tmp_path: Path) -> None:
    node.start("snapshot")
    await unpack(client, tmp_path, Layer([file("f")]), "one")

    async def live(number: int) -> None:
        key = f"c{number}"
        await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key=key, parent="one"))
        with pytest.raises(AlreadyExists):
            await client.call(api.SNAPSHOT_VIEW, api.PrepareSnapshot(key=key))
        await client.call(api.SNAPSHOT_COMMIT, api.CommitSnapshot(key=key, name=f"n{number}"))
        await client.call(api.SNAPSHOT_REMOVE, api.SnapshotRequest(key=f"n{number}"))

    await asyncio.gather(*(live(number) for number in range(60)))
    assert await keys(client) == ["one"]
    await swept(node, 1)


async def test_the_same_layer_asked_of_two_copies_is_unpacked_once(
    node: TestNode, client: Client, tmp_path: Path
) -> None:
    node.start("snapshot")
    layer = Layer([file(f"f{number}", b"x" * 500) for number in range(2_000)])
    infos = await asyncio.gather(*(unpack(client, tmp_path, layer, "one") for _ in range(8)))
    assert all(info == infos[0] for info in infos)
    await swept(node, 1)
    told = Counter(topic for topic, _ in await events(client, "/snapshot/commit"))
    assert told == {"/snapshot/prepare": 1, "/snapshot/commit": 1}


async def test_a_list_of_thousands_comes_whole(client: Client) -> None:
    labels = {"x": "y" * 200}
    for begin in range(0, 2_000, 100):
        requests = [api.PrepareSnapshot(key=f"k{n:05}", labels=labels) for n in range(begin, begin + 100)]
        await asyncio.gather(*(client.call(api.SNAPSHOT_PREPARE, request) for request in requests))
    assert await keys(client) == [f"k{n:05}" for n in range(2_000)]
