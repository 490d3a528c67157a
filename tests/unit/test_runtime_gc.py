"""What the runtime service tells of containers and runs to a collection, on a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.collection import Epoch, Holder
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import Aborted
from shoal_bus.locks import Locks
from shoal_bus.message import pack
from shoal_bus.types import Mount
from shoal_runtime.gc import Collection
from shoal_runtime.mount_manager import MountManager
from shoal_runtime.mount_manager.collecting import MountCollection
from shoal_runtime.mount_manager.places import Places
from shoal_runtime.plan import RunPlan
from shoal_runtime.schema import MIGRATIONS

REF = "containerd.io/gc.ref.content"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "metadata.db", "n", MIGRATIONS)
    yield opened
    opened.close()


@pytest.fixture
def context() -> Context:
    return Context(id="r", node="n", namespace="_", client=cast(Client, None))


def container(database: Database, id: str, key: str, **labels: str) -> None:
    values: dict[str, Any] = {
        "namespace": "ns", "id": id, "request_id": "r", "image": "", "labels": pack(labels), "runtime": "runc",
        "options": b"", "snapshotter": "", "snapshot_key": key, "network": "", "spec": pack({}), "created_at": 0.0,
        "updated_at": 0.0,
    }  # fmt: skip
    with database.write() as tx:
        marks = ", ".join("?" * len(values))
        tx.execute(f"INSERT INTO containers ({', '.join(values)}) VALUES ({marks})", list(values.values()))


def sandbox(database: Database, id: str, **labels: str) -> None:
    with database.write() as tx:
        tx.execute("INSERT INTO sandboxes VALUES ('ns', ?, ?, x'80')", (id, pack(labels)))


async def holders(collection: Collection, context: Context, token: str) -> list[Holder]:
    return [one async for one in collection.holders(context, Epoch(token=token))]


async def test_what_was_held_within_the_epoch_is_told(database: Database, context: Context) -> None:
    collection = Collection(database)
    container(database, "a", "a", **{REF: "d", "other": "x"})
    container(database, "b", "b")
    await collection.open(context, Epoch(token="1"))
    with database.write() as tx:
        tx.execute("DELETE FROM containers WHERE id = 'a'")
        tx.execute("UPDATE containers SET snapshot_key = 'b2' WHERE id = 'b'")
    container(database, "c", "")
    found = {(one.id, tuple(one.snapshots)) for one in await holders(collection, context, "1")}
    assert found == {
        ("a", (("overlayfs", "a"),)),
        ("b", (("overlayfs", "b"),)),
        ("b", (("overlayfs", "b2"),)),
        ("c", ()),
    }
    assert [one.labels for one in await holders(collection, context, "1") if one.id == "a"] == [{REF: "d"}]
    await collection.close(context, Epoch(token="0"))
    assert len(await holders(collection, context, "1")) == 4
    await collection.close(context, Epoch(token="1"))
    with pytest.raises(Aborted):
        await holders(collection, context, "1")
    await collection.open(context, Epoch(token="2"))
    assert {one.id for one in await holders(collection, context, "2")} == {"b", "c"}
    with pytest.raises(Aborted):
        await holders(collection, context, "1")


async def test_what_a_sandbox_refers_to_is_told_also_when_it_stops_within_the_epoch(
    database: Database, context: Context
) -> None:
    collection = Collection(database)
    for id in ("kept", "changed", "deleted"):
        sandbox(database, id, **{REF: id, "other": "x"})
    await collection.open(context, Epoch(token="1"))
    with database.write() as tx:
        tx.execute("DELETE FROM sandboxes WHERE id = 'deleted'")
        tx.execute("UPDATE sandboxes SET labels = ? WHERE id = 'changed'", (pack({REF: "new"}),))
    found = {(one.id, one.labels[REF]) for one in await holders(collection, context, "1")}
    assert found == {("kept", "kept"), ("changed", "changed"), ("changed", "new"), ("deleted", "deleted")}
    assert all(one.snapshots == [] for one in await holders(collection, context, "1"))


async def test_a_run_holds_its_image_before_it_is_a_container(database: Database, context: Context) -> None:
    plan = RunPlan(
        request_id="r", id="web", image="i", config={}, parent="sha256:top", snapshotter="native", runtime="runc",
        network=api.RunNetwork(),
    )  # fmt: skip
    with database.write() as tx:
        tx.execute("INSERT INTO runs VALUES ('ns', 'web', 'r', 'making', ?, 0)", (plan.pack(),))
    collection = Collection(database)
    await collection.open(context, Epoch(token="1"))
    (one,) = await holders(collection, context, "1")
    assert (one.namespace, one.id) == ("ns", "web")
    assert one.snapshots == [("native", "web"), ("native", "sha256:top")]


@pytest.fixture
def manager(database: Database, tmp_path: Path) -> Iterator[MountManager]:
    locks = Locks(tmp_path / "locks")
    yield MountManager(database, locks, Places(tmp_path / "mounts", [tmp_path]))
    locks.close()


async def activate(manager: MountManager, name: str, **labels: str) -> api.Activation:
    context = Context(id=f"r-{name}", node="n", namespace="ns", client=cast(Client, None))
    mounts = [Mount(type="mkdir/overlay", source="overlay")]  # nothing of it is mounted here
    return await manager.activate(context, api.ActivateMounts(name=name, mounts=mounts, labels=labels))


async def test_mounts_that_came_into_use_since_the_mark_are_not_swept(
    database: Database, context: Context, manager: MountManager, tmp_path: Path
) -> None:
    """Whatever is swept must be as it was told: not made, changed, used or referred to since."""
    collection, collecting = Collection(database), MountCollection(database, manager)
    bref = "containerd.io/gc.bref.container"
    for name in ("loose", "changed", "used", "busy", "again"):
        await activate(manager, name)
    await activate(manager, "referring", **{f"{bref}.a": "late", "other": "x"})
    await collection.open(context, Epoch(token="1"))
    told = [one async for one in collecting.mounts(context, Epoch(token="1"))]
    assert {one.name for one in told} == {"loose", "changed", "used", "busy", "again", "referring"}
    assert [one.labels for one in told if one.name == "referring"] == [{f"{bref}.a": "late"}]

    in_ns = Context(id="x", node="n", namespace="ns", client=cast(Client, None))
    await manager.update(in_ns, api.UpdateMount(name="changed", labels={"a": "b"}))
    rootfs = [Mount(type="loop", source="/none")]
    assert [one.type for one in await manager.for_task(in_ns, "used", rootfs)] == ["overlay"]
    await manager.deactivate(in_ns, api.MountRequest(name="again"))
    await activate(manager, "again")
    container(database, "late", "")
    other = Locks(tmp_path / "locks")
    try:
        assert other.try_acquire("ns mount/busy")
        names = ["loose", "changed", "used", "busy", "again", "referring", "none"]
        swept = await collecting.sweep(context, api.SweepMounts(token="1", namespace="ns", names=names))
    finally:
        other.close()
    assert swept.names == ["loose"]
    assert len(list((tmp_path / "mounts").iterdir())) == 5
    with database.write() as tx:
        tx.execute("DELETE FROM containers")
    await collection.open(context, Epoch(token="2"))
    with pytest.raises(Aborted):
        await collecting.sweep(context, api.SweepMounts(token="1", namespace="ns", names=names))
    with pytest.raises(Aborted):
        [one async for one in collecting.mounts(context, Epoch(token="1"))]
    swept = await collecting.sweep(context, api.SweepMounts(token="2", namespace="ns", names=names))
    assert sorted(swept.names) == ["again", "busy", "changed", "referring", "used"]
    assert list((tmp_path / "mounts").iterdir()) == []
