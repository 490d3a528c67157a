"""What every snapshotter must do: a suite that each implementation's tests inherit, with real mounts.

class TestOverlayfs(SnapshotterSuite):
    def snapshotter(self, root: Path) -> Snapshotter:
        return Overlayfs(root)
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Descriptor, Mount
from shoal_bus.verb import Verb
from shoal_runtime.shim.mounts import mount_all, mounts_below, unmount_all
from shoal_snapshot.records import MIGRATIONS
from shoal_snapshot.snapshots import Snapshots
from shoal_snapshot.snapshotter import Snapshotter

from tests.support import images

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)


def context(namespace: str = "default", id: str = "") -> Context:
    """A request's context for calls of the domain without a bus."""
    return Context(id=id or secrets.token_hex(8), node="test", namespace=namespace, client=cast(Any, None))


@contextmanager
def mounted(mounts: Sequence[Mount], directory: Path) -> Iterator[Path]:
    """A mount list, mounted as a shim does it."""
    point = directory / f"mnt-{secrets.token_hex(4)}"
    point.mkdir()
    mount_all([mount.model_dump() for mount in mounts], str(point))
    try:
        yield point
    finally:
        unmount_all(str(point))
        point.rmdir()


def write_blob(directory: Path, layer: images.Layer) -> tuple[Path, Descriptor, str]:
    """A layer as a file, its descriptor and its diff ID; where a test's node has its blobs, if there is one."""
    if (directory / "root" / "snapshot").is_dir():
        directory = directory / "root" / "content" / "claims"
        directory.mkdir(parents=True, exist_ok=True)
    tar = layer.tar()
    data = images.Layer.compress(tar, layer.compression)
    suffix = "" if layer.compression == "none" else f"+{layer.compression}"
    path = directory / f"blob-{secrets.token_hex(6)}"
    path.write_bytes(data)
    media_type = f"application/vnd.oci.image.layer.v1.tar{suffix}"
    return path, Descriptor(media_type=media_type, digest=images.digest_of(data), size=len(data)), images.digest_of(tar)


def claimed(blob: Path, content: Path) -> Path:
    """A file as the content service, whose directory is `content`, would name it for the snapshot service."""
    place = content / "claims" / secrets.token_hex(8)
    place.parent.mkdir(exist_ok=True)
    place.hardlink_to(blob)
    return place


def listing(root: Path) -> dict[str, tuple[Any, ...]]:
    """A tree as one map: what every path is, its attributes, its content."""
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, list[str]] = {}
    for path in sorted(root.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(root))
        content: Any = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
            inodes.setdefault(status.st_ino, []).append(name)
        mtime = None if path.is_dir() and not path.is_symlink() else status.st_mtime_ns // 1_000_000_000
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if not key.startswith("trusted.")
        }
        found[name] = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, mtime, content, xattrs)
    found["(hard links)"] = tuple(sorted(tuple(names) for names in inodes.values() if len(names) > 1))
    return found


class Remote:
    """A snapshotter on a bus, asked as `Snapshots` are."""

    def __init__(self, client: Client, name: str, root: Path) -> None:
        self._client, self._name = client, name
        self.snapshotter = self
        self._root = root

    def ids(self) -> set[int]:
        return {int(place.name) for place in (self._root / "snapshots").iterdir()}

    async def settled(self) -> None:
        """Returns when what was removed has been deleted."""
        await self._client.call(api.SNAPSHOT_CLEANUP.on(self._name), api.SnapshotterRequest())

    async def prepare(self, ctx: Context, request: api.PrepareSnapshot) -> api.Mounts:
        return await self._call(ctx, api.SNAPSHOT_PREPARE, request)

    async def view(self, ctx: Context, request: api.PrepareSnapshot) -> api.Mounts:
        return await self._call(ctx, api.SNAPSHOT_VIEW, request)

    async def commit(self, ctx: Context, request: api.CommitSnapshot) -> api.SnapshotInfo:
        return await self._call(ctx, api.SNAPSHOT_COMMIT, request)

    async def mounts(self, ctx: Context, request: api.SnapshotRequest) -> api.Mounts:
        return await self._call(ctx, api.SNAPSHOT_MOUNTS, request)

    async def stat(self, ctx: Context, request: api.SnapshotRequest) -> api.SnapshotInfo:
        return await self._call(ctx, api.SNAPSHOT_STAT, request)

    async def update(self, ctx: Context, request: api.UpdateSnapshot) -> api.SnapshotInfo:
        return await self._call(ctx, api.SNAPSHOT_UPDATE, request)

    async def usage(self, ctx: Context, request: api.SnapshotRequest) -> api.Usage:
        return await self._call(ctx, api.SNAPSHOT_USAGE, request)

    async def remove(self, ctx: Context, request: api.SnapshotRequest) -> Empty:
        return await self._call(ctx, api.SNAPSHOT_REMOVE, request)

    def each(self, ctx: Context, request: api.ListSnapshots) -> AsyncIterator[api.SnapshotInfo]:
        return self._client.with_namespace(ctx.namespace).stream(api.SNAPSHOT_LIST.on(self._name), request)

    async def _call(self, ctx: Context, verb: Verb[Req, Rep], request: Req) -> Rep:
        return await self._client.with_namespace(ctx.namespace).call(verb.on(self._name), request)


Answers = Snapshots | Remote


class SnapshotterClaims:
    """What every snapshotter does, whatever process it is in: the fixture `snapshots` is what answers for it."""

    COPIES = False
    """A snapshot takes what its parent does, too."""

    async def prepare(self, snapshots: Answers, key: str, parent: str = "", **labels: str) -> list[Mount]:
        request = api.PrepareSnapshot(key=key, parent=parent, labels=labels)
        return (await snapshots.prepare(context(), request)).mounts

    async def view(self, snapshots: Answers, key: str, parent: str = "") -> list[Mount]:
        return (await snapshots.view(context(), api.PrepareSnapshot(key=key, parent=parent))).mounts

    async def commit(self, snapshots: Answers, key: str, name: str, **labels: str) -> api.SnapshotInfo:
        return await snapshots.commit(context(), api.CommitSnapshot(name=name, key=key, labels=labels))

    async def remove(self, snapshots: Answers, key: str) -> None:
        await snapshots.remove(context(), api.SnapshotRequest(key=key))

    async def stat(self, snapshots: Answers, key: str) -> api.SnapshotInfo:
        return await snapshots.stat(context(), api.SnapshotRequest(key=key))

    async def keys(self, snapshots: Answers, *filters: str) -> list[str]:
        return [s.key async for s in snapshots.each(context(), api.ListSnapshots(filters=list(filters)))]

    async def chain(self, snapshots: Answers, tmp_path: Path, depth: int) -> str:
        """Committed layers `l0`…, each with a file of its own; the uppermost one's name."""
        below = ""
        for number in range(depth):
            with mounted(await self.prepare(snapshots, "work", below), tmp_path) as root:
                (root / f"file-{number}").write_text(str(number))
            below = f"l{number}"
            await self.commit(snapshots, "work", below)
        return below

    # ---------------------------------------------------------------------------------------------------------- claims

    async def test_what_is_written_to_an_active_snapshot_is_in_its_commit(
        self, snapshots: Answers, tmp_path: Path
    ) -> None:
        top = await self.chain(snapshots, tmp_path, 3)
        with mounted(await self.view(snapshots, "look", top), tmp_path) as root:
            assert {p.name: p.read_text() for p in root.iterdir()} == {"file-0": "0", "file-1": "1", "file-2": "2"}

    async def test_snapshots_on_one_parent_know_nothing_of_one_another(
        self, snapshots: Answers, tmp_path: Path
    ) -> None:
        top = await self.chain(snapshots, tmp_path, 2)
        with (
            mounted(await self.prepare(snapshots, "a", top), tmp_path) as a,
            mounted(await self.prepare(snapshots, "b", top), tmp_path) as b,
        ):
            (a / "file-0").write_text("changed")
            (a / "file-1").unlink()
            (b / "only-b").touch()
            assert (b / "file-0").read_text() == "0"
            assert sorted(p.name for p in b.iterdir()) == ["file-0", "file-1", "only-b"]
        await self.commit(snapshots, "a", "a-done")
        with mounted(await self.view(snapshots, "look", "a-done"), tmp_path) as root:
            assert {p.name: p.read_text() for p in root.iterdir()} == {"file-0": "changed"}

    async def test_an_active_snapshot_keeps_its_files_from_one_mount_to_the_next(
        self, snapshots: Answers, tmp_path: Path
    ) -> None:
        top = await self.chain(snapshots, tmp_path, 1)
        with mounted(await self.prepare(snapshots, "a", top), tmp_path) as root:
            (root / "kept").write_text("yes")
        again = (await snapshots.mounts(context(), api.SnapshotRequest(key="a"))).mounts
        with mounted(again, tmp_path) as root:
            assert (root / "kept").read_text() == "yes"

    @pytest.mark.parametrize("depth", [0, 1, 2])
    async def test_a_view_cannot_be_written_to(self, snapshots: Answers, tmp_path: Path, depth: int) -> None:
        top = await self.chain(snapshots, tmp_path, depth)
        look = await self.view(snapshots, "look", top)
        with mounted(look, tmp_path) as root, pytest.raises(OSError, match="Read-only file system"):
            (root / "new").touch()

    async def test_a_view_cannot_be_committed(self, snapshots: Answers) -> None:
        await self.view(snapshots, "look")
        with pytest.raises(FailedPrecondition):
            await self.commit(snapshots, "look", "done")
        assert (await self.stat(snapshots, "look")).kind == "view"

    async def test_removed_directories_stay_removed_and_replaced_ones_are_new(
        self, snapshots: Answers, tmp_path: Path
    ) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            for name in ("gone", "new"):
                (root / name).mkdir()
                (root / name / "old").touch()
        await self.commit(snapshots, "a", "one")
        with mounted(await self.prepare(snapshots, "b", "one"), tmp_path) as root:
            for name in ("gone", "new"):
                (root / name / "old").unlink()
                (root / name).rmdir()
            (root / "new").mkdir()
        await self.commit(snapshots, "b", "two")
        with mounted(await self.view(snapshots, "look", "two"), tmp_path) as root:
            assert [str(p.relative_to(root)) for p in root.rglob("*")] == ["new"]

    async def test_the_root_directory_keeps_its_owner_and_mode(self, snapshots: Answers, tmp_path: Path) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            assert root.stat().st_mode & 0o7777 == 0o755
            os.chown(root, 12, 34)
            root.chmod(0o1750)
        await self.commit(snapshots, "a", "one")
        for mounts in (await self.prepare(snapshots, "b", "one"), await self.view(snapshots, "v", "one")):
            with mounted(mounts, tmp_path) as root:
                status = root.stat()
                assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o1750)

    async def test_a_chain_of_many_layers_mounts(self, snapshots: Answers, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 60)
        with mounted(await self.prepare(snapshots, "a", top), tmp_path) as root:
            assert len(list(root.iterdir())) == 60

    async def test_keys_are_unique_whatever_they_name(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a")
        for make in (self.prepare, self.view):
            with pytest.raises(AlreadyExists):
                await make(snapshots, "a")
        await self.prepare(snapshots, "b")
        await self.commit(snapshots, "b", "done")
        with pytest.raises(AlreadyExists):
            await self.commit(snapshots, "a", "done")
        assert (await self.stat(snapshots, "a")).kind == "active"

    async def test_a_parent_must_be_there_and_committed(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a")
        with pytest.raises(NotFound):
            await self.prepare(snapshots, "b", "nothing")
        with pytest.raises(InvalidArgument):
            await self.prepare(snapshots, "b", "a")
        assert await self.keys(snapshots) == ["a"]

    async def test_what_others_lie_on_stays(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a")
        await self.commit(snapshots, "a", "one")
        await self.prepare(snapshots, "b", "one")
        with pytest.raises(FailedPrecondition):
            await self.remove(snapshots, "one")
        await self.remove(snapshots, "b")
        await self.remove(snapshots, "one")
        assert await self.keys(snapshots) == []

    async def test_removed_snapshots_leave_nothing_on_disk(self, snapshots: Answers, tmp_path: Path) -> None:
        before = {str(p) for p in (tmp_path / "root").rglob("*")}
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            deep = root
            for _ in range(50):
                deep = deep / "directory"
                deep.mkdir()
                (deep / "file").touch()
        await self.remove(snapshots, "a")
        await snapshots.settled()
        assert {str(p) for p in (tmp_path / "root").rglob("*")} == before
        for ask in (snapshots.stat, snapshots.mounts, snapshots.usage, snapshots.remove):
            with pytest.raises(NotFound):
                await ask(context(), api.SnapshotRequest(key="a"))

    async def test_a_tree_deeper_than_any_path_is_measured_and_removed(
        self, snapshots: Answers, tmp_path: Path
    ) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            fd = os.open(root, os.O_RDONLY)
            for _ in range(1500):
                os.mkdir("directory", dir_fd=fd)
                inner = os.open("directory", os.O_RDONLY, dir_fd=fd)
                os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
                os.close(fd)
                fd = inner
            os.close(fd)
        usage = await snapshots.usage(context(), api.SnapshotRequest(key="a"))
        assert usage.inodes == 3001
        await self.remove(snapshots, "a")
        await snapshots.settled()
        assert snapshots.snapshotter.ids() == set()

    async def test_a_committed_snapshot_is_not_mounted(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a")
        await self.commit(snapshots, "a", "one")
        with pytest.raises(FailedPrecondition):
            await snapshots.mounts(context(), api.SnapshotRequest(key="one"))
        with pytest.raises(NotFound):
            await snapshots.mounts(context(), api.SnapshotRequest(key="a"))

    async def test_a_commit_replaces_labels_and_an_update_changes_some(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a", old="1")
        info = await self.commit(snapshots, "a", "one", new="2", other="3")
        assert (info.kind, info.parent, info.labels) == ("committed", "", {"new": "2", "other": "3"})

        async def update(labels: dict[str, str], *fields: str) -> dict[str, str]:
            request = api.UpdateSnapshot(key="one", labels=labels, fields=list(fields))
            return (await snapshots.update(context(), request)).labels

        assert await update({"a.b/c": "4", "other": "no"}, "labels.a.b/c") == {"new": "2", "other": "3", "a.b/c": "4"}
        assert await update({}, "labels.other") == {"new": "2", "a.b/c": "4"}
        assert await update({"x": "5"}) == {"x": "5"}
        with pytest.raises(InvalidArgument):
            await update({}, "parent")
        assert (await self.stat(snapshots, "one")).labels == {"x": "5"}

    async def test_lists_are_filtered(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a", app="web")
        await self.commit(snapshots, "a", "one", app="web")
        await self.prepare(snapshots, "b", "one")
        await self.view(snapshots, "c", "one")
        assert await self.keys(snapshots) == ["b", "c", "one"]
        assert await self.keys(snapshots, "kind==committed") == ["one"]
        assert await self.keys(snapshots, "parent==one,kind!=view") == ["b"]
        assert await self.keys(snapshots, "labels.app==web", "name~=^c$") == ["c", "one"]
        with pytest.raises(InvalidArgument):
            await self.keys(snapshots, "kind==")

    async def test_namespaces_do_not_see_one_another(self, snapshots: Answers) -> None:
        await self.prepare(snapshots, "a")
        await self.commit(snapshots, "a", "one")
        other = context("other")
        with pytest.raises(NotFound):
            await snapshots.stat(other, api.SnapshotRequest(key="one"))
        with pytest.raises(NotFound):
            await snapshots.prepare(other, api.PrepareSnapshot(key="b", parent="one"))
        await snapshots.prepare(other, api.PrepareSnapshot(key="one"))
        assert [s.key async for s in snapshots.each(other, api.ListSnapshots())] == ["one"]

    async def test_usage_is_the_layers_own(self, snapshots: Answers, tmp_path: Path) -> None:
        with mounted(await self.prepare(snapshots, "a"), tmp_path) as root:
            (root / "big").write_bytes(os.urandom(1 << 20))
            os.link(root / "big", root / "same")
        active = await snapshots.usage(context(), api.SnapshotRequest(key="a"))
        await self.commit(snapshots, "a", "one")
        committed = await snapshots.usage(context(), api.SnapshotRequest(key="one"))
        assert active == committed
        assert (1 << 20) <= committed.size < (1 << 20) + 65536
        assert committed.inodes == 2
        await self.prepare(snapshots, "b", "one")
        above = await snapshots.usage(context(), api.SnapshotRequest(key="b"))
        if self.COPIES:
            assert (1 << 20) <= above.size < (1 << 20) + 65536
            assert above.inodes == 2
        else:
            assert above.size < 65536
            assert above.inodes == 1

    async def test_many_at_once_get_along(self, snapshots: Answers, tmp_path: Path) -> None:
        top = await self.chain(snapshots, tmp_path, 2)

        async def live(number: int) -> None:
            await self.prepare(snapshots, f"k{number}", top)
            await self.commit(snapshots, f"k{number}", f"n{number}")
            await self.remove(snapshots, f"n{number}")

        await asyncio.gather(*(live(number) for number in range(40)))
        await snapshots.settled()
        assert await self.keys(snapshots) == ["l0", "l1"]
        assert len(snapshots.snapshotter.ids()) == 2


class SnapshotterSuite(SnapshotterClaims):
    """All that, of a snapshotter in this process, and how it mends what others left; `snapshotter` makes it."""

    def snapshotter(self, root: Path) -> Snapshotter:
        raise NotImplementedError

    @pytest.fixture
    async def snapshots(self, tmp_path: Path) -> AsyncIterator[Snapshots]:
        root = tmp_path / "root"
        root.mkdir()
        database = Database(tmp_path / "metadata.db", "test", MIGRATIONS, service="snapshot")
        made = Snapshots(database, self.snapshotter(root))
        yield made
        await made.settled()
        await made.snapshotter.close()
        database.close()
        assert mounts_below(str(tmp_path)) == []

    async def test_a_start_mends_what_a_dead_copy_left(self, snapshots: Snapshots, tmp_path: Path) -> None:
        await self.chain(snapshots, tmp_path, 2)
        await self.prepare(snapshots, "lost", "l1")
        lost = snapshots.records.get("default", "lost").id
        snapshots.snapshotter.discard(lost)  # its directory is gone
        snapshots.snapshotter.make(lost + 7, "active", [])  # a directory that nobody recorded
        snapshots.reconcile()
        await snapshots.settled()
        assert await self.keys(snapshots) == ["l0", "l1"]
        assert snapshots.snapshotter.ids() == {s.id for s in snapshots.records.all()}

    async def test_a_directory_of_a_dead_copy_gives_way(self, snapshots: Snapshots, tmp_path: Path) -> None:
        await self.prepare(snapshots, "a")
        next_id = snapshots.records.get("default", "a").id + 1
        snapshots.snapshotter.make(next_id, "active", [])
        (snapshots.snapshotter.layer(next_id) / "stale").touch()
        with mounted(await self.prepare(snapshots, "b"), tmp_path) as root:
            assert list(root.iterdir()) == []

    async def test_a_change_that_fails_leaves_no_directory(self, snapshots: Snapshots) -> None:
        await self.prepare(snapshots, "a")
        before = snapshots.snapshotter.ids()

        class Refuses(Context):
            def answer(self, tx: Any, reply: Any) -> None:
                raise FailedPrecondition("no")

        refusing = Refuses(id="x", node="test", namespace="default", client=cast(Any, None))
        with pytest.raises(FailedPrecondition, match="no"):
            await snapshots.prepare(refusing, api.PrepareSnapshot(key="b"))
        assert snapshots.snapshotter.ids() == before
        assert await self.keys(snapshots) == ["a"]
