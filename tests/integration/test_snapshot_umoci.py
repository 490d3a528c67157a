"""What is unpacked here and mounted is what `umoci unpack` makes of the same image."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.types import Descriptor

from tests.support import images
from tests.support.images import Layer, directory, entry, file, opaque, symlink, whiteout
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.snapshotter_suite import claimed, listing, mounted


def save(image: images.Image, layout: Path) -> None:
    """An image as an OCI layout, tagged `latest`."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest, (_, data) in [*image.blobs.items(), (image.digest, (image.media_type, image.manifest))]:
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    top = {
        "mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest),
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }  # fmt: skip
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))


def umoci(layout: Path, bundle: Path) -> Path:
    """The root file system umoci makes of it."""
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:latest", str(bundle)], check=True, stdout=subprocess.DEVNULL
    )
    return bundle / "rootfs"


TIME: dict[str, Any] = {"mtime": 1_500_000_000}
XATTR: dict[str, Any] = {"pax_headers": {"SCHILY.xattr.user.note": "kept"}}

BASE = [
    directory("etc", **TIME),
    file("etc/passwd", b"root", 0o644, **TIME),
    file("etc/shadow", b"x", 0o640, gid=42, **TIME, **XATTR),
    directory("usr"),
    directory("usr/bin", 0o755),
    file("usr/bin/su", b"#!", 0o4755, **TIME),
    entry("usr/bin/su2", tarfile.LNKTYPE, 0o4755, linkname="usr/bin/su", **TIME),
    symlink("bin", "usr/bin", **TIME),
    directory("var"),
    directory("var/cache", 0o2775, uid=7, gid=8),
    file("var/cache/a", b"a" * 10_000, **TIME),
    directory("var/cache/deep"),
    file("var/cache/deep/b", b"b", **TIME),
    directory("opt/app"),
    file("opt/app/one", b"1", **TIME),
    file("opt/app/two", b"2", **TIME),
    directory("tmp", 0o1777),
    entry("tty", tarfile.CHRTYPE, 0o666, devmajor=5, devminor=0, **TIME),
    entry("pipe", tarfile.FIFOTYPE, 0o600, uid=3, **TIME),
    file("n" * 100 + "/" + "m" * 120, b"long", **TIME),
    file("ünïcode/☃", b"snow", **TIME),
]
CHANGES: dict[str, Sequence[images.Entry]] = {
    "whiteouts": [whiteout("etc/passwd"), whiteout("var/cache/deep"), whiteout("bin"), whiteout("usr/bin/su2")],
    "opaque": [directory("opt"), directory("opt/app", 0o700), opaque("opt/app"), file("opt/app/three", b"3", **TIME)],
    "opaque last": [directory("opt"), directory("opt/app"), file("opt/app/three", b"3", **TIME), opaque("opt/app")],
    "implied": [file("var/cache/new", b"in a directory that only the layer below describes", **TIME)],
    "hard link below": [
        directory("etc"),
        entry("etc/shadow-", tarfile.LNKTYPE, 0o640, gid=42, linkname="etc/shadow", **TIME, **XATTR),
    ],
    "replaced": [
        file("opt", b"a file now", **TIME),
        symlink("etc", "usr", **TIME),
        directory("tty"),
        file("tty/file", b"", **TIME),
        file("pipe", b"a file, too", **TIME),
    ],
    "modes": [directory("var", 0o711, uid=1), directory("var/cache", 0o500), file("usr/bin/su", b"new", 0o755, **TIME)],
    "opaque root": [file("kept", b"k", **TIME), opaque(""), directory("etc"), file("etc/new", b"n", **TIME)],
    "back again": [whiteout("etc"), directory("etc", 0o750), file("etc/passwd", b"new", **TIME)],
}

LOWEST = [
    directory("etc"), file("etc/passwd", b"older", **TIME), file("low", b"l", **TIME), directory("usr"),
    directory("usr/bin"), file("usr/bin/low", b"l", **TIME), directory("opt"), directory("opt/app"),
    file("opt/app/low", b"l", **TIME), directory("var"), directory("var/cache"), file("var/cache/low", b"l", **TIME),
]  # fmt: skip
ONTO = ["whiteouts", "opaque", "opaque last", "opaque root", "modes", "back again"]


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> TestNode:
    return TestNode(tmp_path, natsd)


async def unpack(client: Client, image: images.Image, blobs: Path) -> str:
    name = ""
    for number, (digest, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True)):
        media_type, data = image.blobs[digest]
        request = api.UnpackLayer(
            name=f"{image.digest}-{number}", parent=name,
            path=str(claimed(blobs / digest.removeprefix("sha256:"), blobs.parents[2])),
            descriptor=Descriptor(media_type=media_type, digest=digest, size=len(data)), diff_id=diff_id,
        )  # fmt: skip
        name = (await client.operate(api.SNAPSHOT_UNPACK, request, timeout=60)).key
    return name


async def test_images_are_what_umoci_makes_of_them(node: TestNode, connection: Connection, tmp_path: Path) -> None:
    with node:
        node.start("snapshot")
        client = Client(connection, node.name)
        cases = {**{name: [BASE, change] for name, change in CHANGES.items()}, "all": [BASE, *_all()]}
        for number, (name, layers) in enumerate(cases.items()):
            image = images.Image.build([Layer(entries) for entries in layers])  # umoci 0.4 reads gzip alone
            layout = node.root / "content" / f"layout-{number}"
            save(image, layout)
            expected = listing(umoci(layout, tmp_path / f"bundle-{number}"))
            top = await unpack(client, image, layout / "blobs" / "sha256")
            view = await client.call(api.SNAPSHOT_VIEW, api.PrepareSnapshot(key=f"look-{number}", parent=top))
            with mounted(view.mounts, tmp_path) as root:
                found = listing(root)
            assert found.keys() == expected.keys(), name
            for path, what in expected.items():
                assert found[path] == what, f"{name}: {path}"


@pytest.mark.parametrize("parent", [True, False])
async def test_layers_applied_to_one_snapshot_are_what_umoci_makes_of_them(
    node: TestNode, connection: Connection, tmp_path: Path, parent: bool
) -> None:
    """On a parent, which the mount shows through a whiteout that nobody made; and without one."""
    with node:
        node.start("snapshot")
        client = Client(connection, node.name)
        for number, change in enumerate([CHANGES[name] for name in ONTO] + [_onto()]):
            image = images.Image.build([Layer(entries) for entries in (LOWEST, BASE, change)])
            layout = node.root / "content" / f"layout-{number}"
            save(image, layout)
            expected = listing(umoci(layout, tmp_path / f"bundle-{number}"))
            blobs = layout / "blobs" / "sha256"
            below = images.Image.build([Layer(LOWEST)])
            top = await unpack(client, below, blobs) if parent else ""
            prepared = await client.call(api.SNAPSHOT_PREPARE, api.PrepareSnapshot(key=f"one-{number}", parent=top))
            for digest in image.layers[1 if parent else 0 :]:
                media_type, data = image.blobs[digest]
                place = claimed(blobs / digest.removeprefix("sha256:"), blobs.parents[2])
                descriptor = Descriptor(media_type=media_type, digest=digest, size=len(data))
                request = api.ApplyLayer(descriptor=descriptor, path=str(place), mounts=prepared.mounts)
                await client.operate(api.DIFF_APPLY, request, timeout=60)
            with mounted(prepared.mounts, tmp_path) as root:
                found = listing(root)
            assert found.keys() == expected.keys(), number
            for path, what in expected.items():
                assert found[path] == what, f"{number}: {path}"


def _onto() -> list[images.Entry]:
    """Changes of what the lowest layer has, what the one above it has, and what both have."""
    return [
        whiteout("etc/passwd"), whiteout("low"), whiteout("usr/bin/low"), whiteout("var/cache"),
        directory("opt/app", 0o711), opaque("opt/app"), file("opt/app/new", b"n", **TIME),
    ]  # fmt: skip


def _all() -> list[Sequence[images.Entry]]:
    """Changes that can follow one another."""
    return [CHANGES[name] for name in ("modes", "whiteouts", "implied", "opaque", "back again")]
