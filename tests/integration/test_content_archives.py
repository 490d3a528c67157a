"""Images from archives and into archives: our own, skopeo's, umoci's and docker's."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound

from tests.support import containerd
from tests.support.archives import docker, given, layout, taken, tar
from tests.support.containerd import Containerd
from tests.support.images import Entry, Image, Layer, busybox_image, digest_of, directory, file, push, symlink
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import Registry, running

NAME = "registry.example/team/app:v1"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.start("content", "snapshot")
        yield started


@pytest.fixture
async def client(node: TestNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def image(**options: Any) -> Image:
    """Three layers, compressed in three ways."""
    layers = [
        Layer([directory("etc"), file("etc/motd", b"hello" * 1000)], "gzip"),
        Layer([file("etc/more", bytes(range(256)) * 2000)], "zstd"),
        Layer([file("etc/last", b"last")], "none"),
    ]
    return Image.build(layers, **options)


def multi() -> Image:
    platforms = [
        Image.build([Layer([file("arch", one.encode())])], architecture=one) for one in ("arm64", "amd64", "s390x")
    ]
    return Image.index(platforms)


async def load(
    client: Client, node: TestNode, archive: bytes | Path, *, fifo: bool = False, **options: Any
) -> dict[str, str]:
    """Imports an archive; the images' digests by name."""
    with given(node, archive, fifo=fifo) as name:
        request = content.ImportImages(archive=name, **options)
        imported = await client.operate(content.IMAGE_IMPORT, request, timeout=60)
    return {one.name: one.target.digest for one in imported.images}


async def save(client: Client, node: TestNode, path: Path, *names: str, **options: Any) -> Path:
    with taken(node, path) as archive:
        request = content.ExportImages(archive=archive, names=list(names), **options)
        await client.operate(content.IMAGE_EXPORT, request, timeout=60)
    return path


async def blobs(client: Client) -> set[str]:
    return {blob.digest for blob in await client.collect(content.BLOB_LIST, content.ListBlobs())}


async def chain_of(client: Client, name: str) -> str:
    return (await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=name))).chain_id


def leftovers(node: TestNode) -> list[Path]:
    root = node.root / "content"
    return [path for part in ("staging", "ingests") for path in (root / part).rglob("*")]


@pytest.mark.parametrize("fifo", [False, True], ids=["file", "fifo"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
async def test_layout_is_loaded_whole_and_unpacked(
    client: Client, node: TestNode, compression: str, fifo: bool
) -> None:
    one = image()
    archive = Layer.compress(tar(layout({NAME: one})), compression)
    assert await load(client, node, archive, fifo=fifo) == {NAME: one.digest}
    assert await blobs(client) == {one.digest, *one.blobs}
    keys = {s.key for s in await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots())}
    assert len(keys) == 3
    assert await chain_of(client, NAME) in keys
    assert leftovers(node) == []
    await client.call(content.IMAGE_DELETE, content.ImageRequest(name=NAME))
    assert await blobs(client) == set()
    assert await client.collect(snapshot.SNAPSHOT_LIST, snapshot.ListSnapshots()) == []


async def test_names_are_those_of_the_archive_or_come_of_the_base_name(client: Client, node: TestNode) -> None:
    one, other = image(), busybox_image()
    archive = tar(layout({"v1": one, "docker.io/library/other:2": other}))
    assert await load(client, node, archive, base_name="registry.example/app") == {
        "registry.example/app:v1": one.digest
    }
    loaded = await load(client, node, archive)
    (dated,) = loaded.keys() - {"docker.io/library/other:2"}
    assert dated.startswith("docker.io/library/import-")
    assert dated.endswith(":v1")
    unnamed = tar(layout({"": one}))
    with pytest.raises(FailedPrecondition, match="base-name"):
        await load(client, node, unnamed)
    assert await load(client, node, unnamed, base_name="app") == {"docker.io/library/app:latest": one.digest}
    assert f"docker.io/library/app@{one.digest}" in await load(client, node, unnamed, base_name="app", digests=True)
    with pytest.raises(FailedPrecondition, match="can't be"):
        await load(client, node, tar(layout({"registry.example/UPPER:1": one})))
    with pytest.raises(InvalidArgument):
        await load(client, node, unnamed, base_name="UPPER")


async def test_of_an_index_the_nodes_own_platform_is_taken_or_all(client: Client, node: TestNode) -> None:
    one = multi()
    own = next(p for p in one.platforms if p.config["architecture"] == "amd64")
    archive = tar(layout({NAME: one}))
    assert await load(client, node, archive) == {NAME: one.digest}
    assert await blobs(client) == {one.digest, own.digest, *own.blobs}
    await load(client, node, archive, platform="linux/s390x", snapshotter="")
    assert (await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name=NAME, platform="s390x"))).layers
    await load(client, node, archive, all_platforms=True)
    assert len(await blobs(client)) == 1 + 3 * 3
    with pytest.raises(NotFound, match="riscv64"):
        await load(client, node, archive, platform="linux/riscv64")
    arm = next(p for p in one.platforms if p.config["architecture"] == "arm64")
    partial = tar(layout({NAME: one}, leave_out=[arm.digest, *arm.blobs]))
    other = client.with_namespace("other")
    assert await load(other, node, partial) == {NAME: one.digest}
    with pytest.raises(NotFound, match=arm.digest):
        await load(client.with_namespace("third"), node, partial, all_platforms=True)


async def test_docker_archive_is_loaded_with_its_links(client: Client, node: TestNode) -> None:
    one = Image.build(
        [Layer([file("a", b"a")], "none"), Layer([file("b", b"b")], "none")], flavour="docker", config={"Cmd": ["x"]}
    )
    top = one.layers[1].removeprefix("sha256:")
    links = [symlink("0" * 64 + "/layer.tar", f"../{top}/layer.tar")]
    names = [f"{one.layers[0].removeprefix('sha256:')}/layer.tar", "0" * 64 + "/layer.tar"]
    archive = tar(docker({"app:v1": one}, links=links, layers=names))
    loaded = await load(client, node, archive, fifo=True)
    assert list(loaded) == ["docker.io/library/app:v1"]
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name="app:v1"))
    assert resolved.config["config"]["Cmd"] == ["x"]
    assert [layer.digest for layer in resolved.layers] == one.layers
    assert resolved.diff_ids == one.diff_ids
    assert await client.call(snapshot.SNAPSHOT_STAT, snapshot.SnapshotRequest(key=resolved.chain_id))


async def test_docker_archive_from_before_1_10_is_loaded(client: Client, node: TestNode) -> None:
    layers = [tar([file("a", b"a")]), tar([file("b", b"b")])]
    ids = ["a" * 64, "b" * 64]
    entries: list[Entry] = []
    for at, id in enumerate(ids):
        told: dict[str, Any] = {
            "id": id, "created": "2015-01-01T00:00:00Z", "architecture": "amd64", "os": "linux",
            "container_config": {"Cmd": ["/bin/sh", "-c", f"step {at}"]}, "config": {"Cmd": ["run"]},
        }  # fmt: skip
        if at:
            told["parent"] = ids[at - 1]
        entries += [directory(id), file(f"{id}/VERSION", b"1.0"), file(f"{id}/json", json.dumps(told).encode())]
        entries.append(file(f"{id}/layer.tar", layers[at]))
    entries.append(file("repositories", json.dumps({"team/old": {"v0": ids[1]}}).encode()))
    loaded = await load(client, node, tar(entries))
    assert list(loaded) == ["docker.io/team/old:v0"]
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name="team/old:v0"))
    assert resolved.diff_ids == [digest_of(layer) for layer in layers]
    assert resolved.config["config"]["Cmd"] == ["run"]
    assert [step["created_by"] for step in resolved.config["history"]] == ["/bin/sh -c step 0", "/bin/sh -c step 1"]


async def test_saved_archive_is_the_same_each_time_and_loads_as_it_was(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    one, two = image(), multi()
    await load(client, node, tar(layout({NAME: one, "registry.example/multi:1": two})), all_platforms=True)
    names = (NAME, "registry.example/multi:1")
    first = await save(client, node, tmp_path / "first.tar", *names, all_platforms=True)
    second = await save(client, node, tmp_path / "second.tar", *reversed(names), all_platforms=True)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.uid, m.gid, m.mtime) for m in members} == {(0, 0, 0)}
    other = client.with_namespace("other")
    assert await load(other, node, first, all_platforms=True) == {NAME: one.digest, names[1]: two.digest}
    assert await blobs(other) == await blobs(client)


async def test_of_an_index_one_platform_is_saved_as_an_image_of_its_own(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    one = multi()
    await load(client, node, tar(layout({NAME: one})), all_platforms=True)
    own = next(p for p in one.platforms if p.config["architecture"] == "arm64")
    saved = await save(client, node, tmp_path / "a.tar", NAME, platform="linux/arm64")
    other = client.with_namespace("other")
    assert await load(other, node, saved) == {NAME: own.digest}
    assert await blobs(other) == {own.digest, *own.blobs}


async def test_blobs_of_sha512_and_long_names_survive_the_way_out_and_in(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    one = Image.build([Layer([file("a", b"a")], "none")])
    manifest = json.loads(one.manifest)
    layer = one.blobs[one.layers[0]][1]
    long = f"sha512:{hashlib.sha512(layer).hexdigest()}"
    manifest["layers"][0]["digest"] = long
    blobs = {digest: blob for digest, blob in one.blobs.items() if digest != one.layers[0]}
    renamed = Image(one.media_type, json.dumps(manifest).encode(), blobs | {long: ("", layer)})
    archive = tar(layout({NAME: renamed}))
    assert await load(client, node, archive) == {NAME: renamed.digest}
    saved = await save(client, node, tmp_path / "a.tar", NAME)
    assert await load(client.with_namespace("other"), node, saved) == {NAME: renamed.digest}


# ------------------------------------------------------------------------------------------------ what others make


def skopeo(*arguments: str) -> None:
    subprocess.run(["skopeo", "--insecure-policy", *arguments], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
async def test_what_skopeo_makes_is_loaded(
    client: Client, node: TestNode, registry: Registry, tmp_path: Path, kind: str
) -> None:
    flavour: Any = "docker" if kind == "docker-archive" else "oci"
    one = busybox_image(["echo", "hi"], flavour=flavour)
    push(one, registry.host, "app", "v1")
    archive = tmp_path / "a.tar"
    source = f"docker://{registry.host}/app:v1"
    skopeo("copy", "--src-tls-verify=false", source, f"{kind}:{archive}:docker.io/team/app:v1")
    loaded = await load(client, node, archive, fifo=True)
    assert list(loaded) == ["docker.io/team/app:v1"]
    resolved = await client.call(content.IMAGE_RESOLVE, content.ResolveImage(name="team/app:v1"))
    assert resolved.diff_ids == one.diff_ids
    assert resolved.config["config"]["Cmd"] == ["echo", "hi"]


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
async def test_what_is_saved_skopeo_reads(client: Client, node: TestNode, tmp_path: Path, kind: str) -> None:
    one = busybox_image(["echo", "hi"], flavour="docker" if kind == "docker-archive" else "oci")
    await load(client, node, tar(layout({NAME: one})))
    saved = await save(client, node, tmp_path / "a.tar", NAME)
    out = tmp_path / "copied"
    skopeo("copy", f"{kind}:{saved}", f"dir:{out}")
    manifest = json.loads((out / "manifest.json").read_text())
    config = json.loads((out / manifest["config"]["digest"].removeprefix("sha256:")).read_text())
    assert config["rootfs"]["diff_ids"] == one.diff_ids


async def test_what_is_saved_umoci_reads_and_what_it_makes_is_loaded(
    client: Client, node: TestNode, tmp_path: Path
) -> None:
    one = busybox_image(["echo", "hi"])
    await load(client, node, tar(layout({NAME: one})))
    saved = await save(client, node, tmp_path / "a.tar", NAME)
    place = tmp_path / "layout"
    with tarfile.open(saved) as archive:
        archive.extractall(place)
    subprocess.run(
        ["umoci", "unpack", "--image", f"{place}:v1", str(tmp_path / "bundle")], check=True, stdout=subprocess.DEVNULL
    )
    assert (tmp_path / "bundle" / "rootfs" / "bin" / "sh").is_symlink()
    subprocess.run(["umoci", "config", "--image", f"{place}:v1", "--tag", "v2", "--config.cmd", "other"], check=True)
    made = tmp_path / "made.tar"
    subprocess.run(["tar", "-C", str(place), "-cf", str(made), "."], check=True)
    loaded = await load(client, node, made, base_name="registry.example/team/app")
    assert "registry.example/team/app:v2" in loaded
    resolve = content.ResolveImage(name="registry.example/team/app:v2")
    assert (await client.call(content.IMAGE_RESOLVE, resolve)).config["config"]["Cmd"] == ["other"]


@pytest.fixture
def theirs() -> Iterator[Containerd]:
    with containerd.running() as started:
        yield started


async def test_containerd_reads_what_is_saved_and_what_it_writes_is_loaded(
    client: Client, node: TestNode, tmp_path: Path, theirs: Containerd
) -> None:
    one, several = image(), multi()
    names = (NAME, "registry.example/multi:1")
    await load(client, node, tar(layout({NAME: one, names[1]: several})), all_platforms=True)
    saved = await save(client, node, tmp_path / "a.tar", *names, all_platforms=True)
    theirs.ctr("images", "import", "--no-unpack", "--all-platforms", str(saved))
    listed = theirs.ctr("images", "ls")
    for name, digest in zip(names, (one.digest, several.digest), strict=True):
        assert any(name in line and digest in line for line in listed.splitlines()), listed
    theirs.ctr("images", "export", "--all-platforms", str(tmp_path / "all.tar"), *names)
    other = client.with_namespace("other")
    loaded = await load(other, node, tmp_path / "all.tar", all_platforms=True)
    assert loaded == {NAME: one.digest, names[1]: several.digest}
    # Of one platform, it writes the whole index, and of the others nothing else.
    theirs.ctr("images", "export", "--platform", "linux/amd64", str(tmp_path / "own.tar"), names[1])
    third = client.with_namespace("third")
    assert await load(third, node, tmp_path / "own.tar") == {names[1]: several.digest}
    assert len(await blobs(third)) == 4


async def test_missing_image_and_missing_archive_are_told(client: Client, node: TestNode, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no-such"):
        await save(client, node, tmp_path / "a.tar", "registry.example/no-such:1")
    with pytest.raises(NotFound, match="archive"):
        await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive="nowhere"))
    with pytest.raises(InvalidArgument):
        await client.operate(content.IMAGE_IMPORT, content.ImportImages.model_construct(archive="../../etc/passwd"))
    with pytest.raises(InvalidArgument):
        await client.operate(
            content.IMAGE_EXPORT, content.ExportImages.model_construct(archive="/etc/passwd", names=["x"])
        )


async def test_cancelled_import_leaves_nothing(client: Client, node: TestNode) -> None:
    """Through a FIFO that nobody writes to any more."""
    place = node.state / content.ARCHIVES / "silent"
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place)
    loading = asyncio.create_task(client.operate(content.IMAGE_IMPORT, content.ImportImages(archive="silent")))
    fd = await asyncio.to_thread(os.open, place, os.O_WRONLY)
    os.write(fd, tar(layout({NAME: image()}))[:4096])
    await asyncio.sleep(0.3)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    async with asyncio.timeout(20):
        while leftovers(node):
            await asyncio.sleep(0.05)
    os.close(fd)
    place.unlink()
    assert await blobs(client) == set()


async def test_images_larger_than_memory_limits_are_streamed(client: Client, node: TestNode, tmp_path: Path) -> None:
    """The worker's and the service's memory stay far below what goes through them."""
    data = bytes(1 << 20)
    place = tmp_path / "big.tar"
    big = Image.build([Layer([file("big", data * 200)], "none")])
    place.write_bytes(tar(layout({NAME: big})))
    with given(node, place, fifo=True) as name:
        loading = asyncio.create_task(
            client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=name, snapshotter=""), timeout=60)
        )
        most = 0
        while not loading.done():
            most = max(most, memory_below(node.of("content").pid))
            await asyncio.sleep(0.01)
        await loading
    assert most < 120 << 20, f"{most >> 20} MiB"


def memory_below(pid: int) -> int:
    """What a process and its children have in memory of their own, in bytes."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children()]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total
