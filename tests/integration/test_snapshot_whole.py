"""Layers carried out on whole trees, and layers that were computed: what `umoci unpack` makes of the same image."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.types import Descriptor

from tests.integration.test_snapshot_umoci import BASE, CHANGES, _all, save, umoci
from tests.support import images
from tests.support.disks import btrfs
from tests.support.images import Layer, directory, entry, file, opaque, symlink, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import claimed, listing, mounted, write_blob


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[TestNode]:
    """A node on a btrfs, where all snapshotters work."""
    (tmp_path / "place").mkdir()
    with btrfs(tmp_path / "place") as place:
        (tmp_path / "root").symlink_to(place)
        with TestNode(tmp_path, natsd) as started:
            started.start("content", "snapshot")
            yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


async def unpack(client: Client, image: images.Image, blobs: Path, on: str) -> str:
    name = ""
    for number, (digest, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True)):
        media_type, data = image.blobs[digest]
        request = snapshot.UnpackLayer(
            name=f"{image.digest}-{number}", parent=name,
            path=str(claimed(blobs / digest.removeprefix("sha256:"), blobs.parents[2])),
            descriptor=Descriptor(media_type=media_type, digest=digest, size=len(data)), diff_id=diff_id,
        )  # fmt: skip
        name = (await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)).key
    return name


@pytest.mark.parametrize("on", ["native", "btrfs"])
async def test_images_are_what_umoci_makes_of_them(node: TestNode, client: Client, tmp_path: Path, on: str) -> None:
    cases = {**{name: [BASE, change] for name, change in CHANGES.items()}, "all": [BASE, *_all()]}
    for number, (name, layers) in enumerate(cases.items()):
        image = images.Image.build([Layer(entries) for entries in layers])
        layout = node.root / "content" / f"layout-{number}"
        save(image, layout)
        expected = listing(umoci(layout, tmp_path / f"bundle-{number}"))
        top = await unpack(client, image, layout / "blobs" / "sha256", on)
        request = snapshot.PrepareSnapshot(key=f"look-{number}", parent=top)
        view = await client.call(snapshot.SNAPSHOT_VIEW.on(on), request)
        with mounted(view.mounts, tmp_path) as root:
            found = listing(root)
        assert found.keys() == expected.keys(), name
        for path, what in expected.items():
            assert found[path] == what, f"{name}: {path}"


@pytest.mark.parametrize("on", ["overlayfs", "native", "btrfs"])
async def test_umoci_reads_computed_layers_as_they_were_meant(client: Client, tmp_path: Path, on: str) -> None:
    path, blob, diff_id = write_blob(tmp_path, Layer(BASE))
    request = snapshot.UnpackLayer(name="base", descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)
    prepare = snapshot.PrepareSnapshot(key="c", parent="base")
    upper = (await client.call(snapshot.SNAPSHOT_PREPARE.on(on), prepare)).mounts
    look = snapshot.PrepareSnapshot(key="v", parent="base")
    lower = (await client.call(snapshot.SNAPSHOT_VIEW.on(on), look)).mounts
    with mounted(upper, tmp_path) as root:
        (root / "etc/passwd").unlink()
        (root / "etc/shadow").chmod(0o600)
        (root / "usr/bin/su3").hardlink_to(root / "usr/bin/su")
        (root / "bin").unlink()
        (root / "bin").mkdir()
        (root / "opt/app/one").unlink()
        (root / "opt/app/one").mkdir()
        (root / "opt/app/one" / ("l" * 180)).write_text("long")
        os.setxattr(root / "var/cache/a", "user.note", b"new")
        os.utime(root / "var/cache/a", (5, 5))
        for name in ("var/cache/deep/b", "n" * 100 + "/" + "m" * 120):
            (root / name).unlink()
        expected = listing(root)
    made = await client.operate(snapshot.DIFF_COMPUTE, snapshot.ComputeDiff(lower=lower, upper=upper), timeout=60)
    read = content.ReadBlob(digest=made.descriptor.digest)
    data = b"".join([chunk.data async for chunk in client.stream(content.BLOB_READ, read)])
    image = images.Image.build([Layer(BASE), Readymade(data)])
    save(image, tmp_path / "layout")
    found = listing(umoci(tmp_path / "layout", tmp_path / "bundle"))
    assert found.keys() == expected.keys()
    for name, what in expected.items():
        assert found[name] == what, name


class Readymade(Layer):
    """A layer that is there already, gzip and all."""

    def __init__(self, data: bytes) -> None:
        super().__init__([], "gzip")
        self._tar = gzip.decompress(data)

    def tar(self) -> bytes:
        return self._tar


HOSTILE = [
    [whiteout("../../outside"), whiteout("a/../../../outside")],
    [symlink("link", "/"), whiteout("link/outside"), opaque("link")],
    [symlink("link", "../../../../.."), whiteout("link/outside"), directory("link/etc")],
    [symlink("d/inner", "/"), opaque("d/inner"), whiteout("d/inner/outside")],
    [entry("d/inner", tarfile.SYMTYPE, 0o777, linkname="../../.."), opaque("d/inner")],
]


@pytest.mark.parametrize("on", ["native", "btrfs"])
@pytest.mark.parametrize("number", range(len(HOSTILE)))
async def test_whiteouts_remove_nothing_outside(
    node: TestNode, client: Client, tmp_path: Path, on: str, number: int
) -> None:
    for place in (tmp_path, node.root, node.root / "snapshot" / on / "snapshots"):
        (place / "outside").mkdir(exist_ok=True)
        (place / "outside/secret").write_text("kept")
    path, blob, diff_id = write_blob(tmp_path, Layer([directory("d"), file("d/file"), file("outside")]))
    request = snapshot.UnpackLayer(name="one", descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)
    path, blob, diff_id = write_blob(tmp_path, Layer(HOSTILE[number]))
    request = snapshot.UnpackLayer(name="two", parent="one", descriptor=blob, path=str(path), diff_id=diff_id)
    await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)
    for place in (tmp_path, node.root, node.root / "snapshot" / on / "snapshots"):
        assert (place / "outside/secret").read_text() == "kept"
    view = await client.call(snapshot.SNAPSHOT_VIEW.on(on), snapshot.PrepareSnapshot(key="v", parent="one"))
    with mounted(view.mounts, tmp_path) as root:
        assert sorted(p.name for p in root.iterdir()) == ["d", "outside"], "its parent is as it was"


@pytest.mark.parametrize("on", ["native", "btrfs"])
async def test_a_whiteout_takes_nothing_of_its_own_layer_away(client: Client, tmp_path: Path, on: str) -> None:
    layers = [
        [directory("d"), file("d/old"), directory("d/sub"), file("d/sub/old"), directory("e"), file("e/old"),
         file("f")],
        [directory("d"), file("d/new"), directory("d/sub"), file("d/sub/new"), opaque("d"),
         file("e/new"), whiteout("e"), file("f", b"new"), whiteout("f"), whiteout("nothing")],
    ]  # fmt: skip
    below = ""
    for number, entries in enumerate(layers):
        path, blob, diff_id = write_blob(tmp_path, Layer(entries))
        request = snapshot.UnpackLayer(
            name=f"l{number}", parent=below, descriptor=blob, path=str(path), diff_id=diff_id
        )
        below = (await client.operate(snapshot.SNAPSHOT_UNPACK.on(on), request, timeout=60)).key
    view = await client.call(snapshot.SNAPSHOT_VIEW.on(on), snapshot.PrepareSnapshot(key="v", parent=below))
    with mounted(view.mounts, tmp_path) as root:
        found = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
        assert found == ["d", "d/new", "d/sub", "d/sub/new", "e", "e/new", "f"]
        assert (root / "f").read_bytes() == b"new"


async def test_all_snapshotters_work_on_a_btrfs(client: Client) -> None:
    listed = await client.collect(snapshot.SNAPSHOTTER_LIST, snapshot.SnapshotterRequest())
    assert [s.name for s in listed] == ["overlayfs", "native", "btrfs"]
