"""Images, leases, snapshots and layers through the gateway: masks, codes, and what is collected when."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as content
from shoal_gateway.proto.containerd.services.diff.v1 import diff_pb2 as diff
from shoal_gateway.proto.containerd.services.images.v1 import images_pb2 as pb
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2 as leases
from shoal_gateway.proto.containerd.services.snapshots.v1 import snapshots_pb2 as snapshots
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor
from shoal_gateway.proto.containerd.types.mount_pb2 import Mount

from tests.support.gateway import refusal, rpc, socket_of
from tests.support.leaks import Leaks
from tests.support.natsd import NatsServer
from tests.support.node import TestNode

CONTENT = "/containerd.services.content.v1.Content"
DIFF = "/containerd.services.diff.v1.Diff"
IMAGES = "/containerd.services.images.v1.Images"
LEASES = "/containerd.services.leases.v1.Leases"
SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots"
IN = (("containerd-namespace", "default"),)
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
GONE = "sha256:" + 64 * "0"
ROOT = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}
"""What a client labels with this isn't collected."""


SEALED = f"{LAYER}+sealed"
PROCESSORS = f"""
[stream_processors."io.containerd.test.unseal"]
accepts = ["{SEALED}"]
returns = "{LAYER}"
path = "{sys.executable}"
args = ["-c", "import os, sys; key = open(3, 'rb').read() if os.path.exists('/proc/self/fd/3') else b'none'; \
data = sys.stdin.buffer.read(); \
sys.exit('no') if not data.startswith(key) else sys.stdout.buffer.write(data[len(key):])"]
"""
"""It takes its payload off the beginning of a layer."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("n")
    leaks = Leaks(str(directory))
    with NatsServer(directory / "nats") as natsd, TestNode(directory, natsd) as made:
        made.start("content", "gateway")
        processors = directory / "processors.toml"
        processors.write_text(PROCESSORS)
        made.start("snapshot", arguments=("--stream-processors", str(processors)))
        yield made
        assert "Traceback" not in made.of("gateway").log.read_text()
    leaks.check()


@pytest.fixture
async def channel(node: TestNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{socket_of(node)}") as opened:
        yield opened


async def call(channel: grpc.aio.Channel, method: str, request: Any, reply: Any = None, lease: str = "") -> Any:
    metadata = (*IN, ("containerd-lease", lease)) if lease else IN
    return await rpc(channel, method, request, reply=reply, metadata=metadata)


async def refused(channel: grpc.aio.Channel, method: str, request: Any) -> tuple[str, str]:
    return await refusal(channel, method, request, metadata=IN)


async def put(channel: grpc.aio.Channel, data: bytes, lease: str = "", **labels: str) -> Descriptor:
    """A blob, written in one message."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    write = channel.stream_stream(f"{CONTENT}/Write")(
        metadata=(*IN, ("containerd-lease", lease)) if lease else IN, timeout=20
    )
    await write.write(
        content.WriteContentRequest(
            action=content.COMMIT, ref=digest, data=data, expected=digest, labels=labels
        ).SerializeToString()
    )
    await write.done_writing()
    async for _ in write:
        pass
    return Descriptor(media_type=MANIFEST, digest=digest, size=len(data))


async def there(channel: grpc.aio.Channel, digest: str) -> bool:
    try:
        await call(channel, f"{CONTENT}/Info", content.InfoRequest(digest=digest))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise
    return True


async def create(channel: grpc.aio.Channel, name: str, target: Descriptor, **labels: str) -> pb.Image:
    request = pb.CreateImageRequest(image=pb.Image(name=name, target=target, labels=labels))
    return (await call(channel, f"{IMAGES}/Create", request, pb.CreateImageResponse)).image


async def update(channel: grpc.aio.Channel, image: pb.Image, *paths: str) -> pb.Image:
    request = pb.UpdateImageRequest(image=image)
    request.update_mask.paths.extend(paths)
    return (await call(channel, f"{IMAGES}/Update", request, pb.UpdateImageResponse)).image


def target(text: str = "x", **annotations: str) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return Descriptor(media_type=MANIFEST, digest=digest, size=9, annotations=annotations)


# ----------------------------------------------------------------------------------------------------------- images


async def test_an_image_is_created_told_listed_and_deleted(channel: grpc.aio.Channel) -> None:
    made = await create(channel, "one", target(note="n"), team="blue", empty="")
    assert (made.name, made.target, dict(made.labels)) == ("one", target(note="n"), {"team": "blue"})
    assert made.created_at == made.updated_at
    found = await call(channel, f"{IMAGES}/Get", pb.GetImageRequest(name="one"), pb.GetImageResponse)
    assert found.image == made
    code, message = await refused(
        channel, f"{IMAGES}/Create", pb.CreateImageRequest(image=pb.Image(name="one", target=target()))
    )
    assert (code, message) == ("ALREADY_EXISTS", 'image "one": already exists')
    for filters, names in (
        ([], ["one"]),
        (["name==one", "name==two"], ["one"]),
        (["target.digest==" + target().digest, "name==two"], ["one"]),
        (["labels.team==red"], []),
        (["annotations.note==n"], ["one"]),
    ):
        listed = await call(channel, f"{IMAGES}/List", pb.ListImagesRequest(filters=filters), pb.ListImagesResponse)
        assert [image.name for image in listed.images] == names, filters
    wrong = pb.DeleteImageRequest(name="one", target=target("other"))
    assert (await refused(channel, f"{IMAGES}/Delete", wrong))[0] == "NOT_FOUND"
    await call(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="one", target=target()))
    code, message = await refused(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="one"))
    assert (code, message) == ("NOT_FOUND", 'image "one": not found')


async def test_masks_say_what_of_an_image_changes(channel: grpc.aio.Channel) -> None:
    await create(channel, "masked", target(a="1", b="2"), x="1", y="2")
    changed = pb.Image(name="masked", target=target("new", a="9", c="3"), labels={"x": "9", "z": "3"})
    got = await update(channel, changed, "labels.x", "labels.y", "annotations.a", "annotations.b")
    assert (dict(got.labels), got.target) == ({"x": "9"}, target(a="9"))
    got = await update(channel, changed, "labels")
    assert (dict(got.labels), got.target) == ({"x": "9", "z": "3"}, target(a="9"))
    got = await update(channel, changed, "annotations")
    assert got.target == target(a="9", c="3")
    got = await update(channel, changed, "target")
    assert got.target == target("new", a="9", c="3")
    got = await update(channel, pb.Image(name="masked", target=target("all")))
    assert (dict(got.labels), got.target) == ({}, target("all"))
    for path in ("name", "target.digest", "labels.", "nonsense"):
        request = pb.UpdateImageRequest(image=changed)
        request.update_mask.paths.append(path)
        assert (await refused(channel, f"{IMAGES}/Update", request))[0] == "INVALID_ARGUMENT", path
    await call(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="masked"))


async def test_a_source_date_epoch_is_an_images_time(channel: grpc.aio.Channel) -> None:
    request = pb.CreateImageRequest(
        image=pb.Image(name="dated", target=target()), source_date_epoch=Timestamp(seconds=1_000_000_000)
    )
    made = (await call(channel, f"{IMAGES}/Create", request, pb.CreateImageResponse)).image
    assert (made.created_at.seconds, made.updated_at.seconds) == (1_000_000_000, 1_000_000_000)
    again = pb.UpdateImageRequest(image=made, source_date_epoch=Timestamp(seconds=1_500_000_000))
    updated = (await call(channel, f"{IMAGES}/Update", again, pb.UpdateImageResponse)).image
    assert (updated.created_at.seconds, updated.updated_at.seconds) == (1_000_000_000, 1_500_000_000)
    await call(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="dated"))


@pytest.mark.parametrize(
    "image",
    [
        pb.Image(target=target()),
        pb.Image(name="bad"),
        pb.Image(name="bad", target=Descriptor(media_type=MANIFEST, digest="nonsense", size=1)),
        pb.Image(name="bad", target=Descriptor(media_type=MANIFEST, digest=GONE)),
        pb.Image(name="bad", target=Descriptor(digest=GONE, size=1)),
        pb.Image(name="bad", target=Descriptor(media_type=MANIFEST, digest=GONE, size=-1)),
        pb.Image(name="bad", target=target(), labels={"k" * 4000: "v" * 97}),
    ],
)
async def test_an_image_that_cant_be_is_refused(channel: grpc.aio.Channel, image: pb.Image) -> None:
    assert (await refused(channel, f"{IMAGES}/Create", pb.CreateImageRequest(image=image)))[0] == "INVALID_ARGUMENT"


# ------------------------------------------------------------------------------------------- what is kept, and how long


async def test_labels_and_images_keep_what_they_lead_to_until_they_go(channel: grpc.aio.Channel) -> None:
    layer = await put(channel, b"layer")
    labels = {"containerd.io/gc.ref.content.l.0": layer.digest}
    manifest = await put(channel, json.dumps({"any": "document"}).encode(), **labels)
    loose = await put(channel, b"loose")
    rooted = await put(channel, b"rooted", **{"containerd.io/gc.root": "2026-01-01T00:00:00Z"})
    await create(channel, "keeps", manifest)
    await create(channel, "other", target())
    await call(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="other", sync=True))
    assert [await there(channel, one.digest) for one in (layer, manifest, loose, rooted)] == [True, True, False, True]
    await call(channel, f"{IMAGES}/Delete", pb.DeleteImageRequest(name="keeps", sync=True))
    assert [await there(channel, one.digest) for one in (layer, manifest, rooted)] == [False, False, True]
    await call(channel, f"{CONTENT}/Delete", content.DeleteContentRequest(digest=rooted.digest))


async def test_leases_hold_what_they_are_told_to(channel: grpc.aio.Channel) -> None:
    made = (
        await call(channel, f"{LEASES}/Create", leases.CreateRequest(labels={"a": "b"}), leases.CreateResponse)
    ).lease
    assert made.id
    assert made.HasField("created_at")
    code, message = await refused(channel, f"{LEASES}/Create", leases.CreateRequest(id=made.id))
    assert (code, message) == ("ALREADY_EXISTS", f'lease "{made.id}": already exists')
    blob = await put(channel, b"held", lease=made.id)
    more = [("content", GONE), ("ingests", "some ref"), ("images", "an image"), ("snapshots/overlayfs", "a key")]
    for type, id in more:
        request = leases.AddResourceRequest(id=made.id, resource=leases.Resource(type=type, id=id))
        await call(channel, f"{LEASES}/AddResource", request)

    async def held() -> set[tuple[str, str]]:
        request = leases.ListResourcesRequest(id=made.id)
        reply = await call(channel, f"{LEASES}/ListResources", request, leases.ListResourcesResponse)
        return {(one.type, one.id) for one in reply.resources}

    assert await held() == {*more, ("content", blob.digest)}
    for type, id in more:
        request = leases.DeleteResourceRequest(id=made.id, resource=leases.Resource(type=type, id=id))
        await call(channel, f"{LEASES}/DeleteResource", request)
    assert await held() == {("content", blob.digest)}
    listed = await call(
        channel, f"{LEASES}/List", leases.ListRequest(filters=["labels.a==b"]), leases.ListResponse
    )  # fmt: skip
    assert [one.id for one in listed.leases] == [made.id]
    await call(channel, f"{LEASES}/Delete", leases.DeleteRequest(id=made.id, sync=True))
    assert not await there(channel, blob.digest)
    for method, request, code in (
        ("Delete", leases.DeleteRequest(id=made.id), "NOT_FOUND"),
        ("ListResources", leases.ListResourcesRequest(id=made.id), "NOT_FOUND"),
        ("AddResource", leases.AddResourceRequest(id=made.id, resource=leases.Resource(type="images", id="x")),
         "NOT_FOUND"),
        ("AddResource", leases.AddResourceRequest(id="x", resource=leases.Resource(type="content", id="x")),
         "INVALID_ARGUMENT"),
        ("AddResource", leases.AddResourceRequest(id="x", resource=leases.Resource(type="snapshots", id="x")),
         "INVALID_ARGUMENT"),
        ("AddResource", leases.AddResourceRequest(id="x", resource=leases.Resource(type="volumes", id="x")),
         "UNIMPLEMENTED"),
        ("Create", leases.CreateRequest(id="x", labels={"k": "v" * 4096}), "INVALID_ARGUMENT"),
        ("List", leases.ListRequest(filters=["id=="]), "INVALID_ARGUMENT"),
    ):  # fmt: skip
        assert (await refused(channel, f"{LEASES}/{method}", request))[0] == code, request


# -------------------------------------------------------------------------------------------------------- snapshots


async def prepare(
    channel: grpc.aio.Channel, key: str, parent: str = "", name: str = "overlayfs", lease: str = "", **labels: str
) -> list[Mount]:
    request = snapshots.PrepareSnapshotRequest(snapshotter=name, key=key, parent=parent, labels=labels)
    reply = await call(channel, f"{SNAPSHOTS}/Prepare", request, snapshots.PrepareSnapshotResponse, lease)
    return list(reply.mounts)


async def commit(channel: grpc.aio.Channel, name: str, key: str, snapshotter: str = "overlayfs", **more: Any) -> None:
    request = snapshots.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key, **more)
    await call(channel, f"{SNAPSHOTS}/Commit", request)


async def stat(channel: grpc.aio.Channel, key: str, name: str = "overlayfs") -> snapshots.Info:
    request = snapshots.StatSnapshotRequest(snapshotter=name, key=key)
    return (await call(channel, f"{SNAPSHOTS}/Stat", request, snapshots.StatSnapshotResponse)).info


async def remove(channel: grpc.aio.Channel, *keys: str, name: str = "overlayfs") -> None:
    for key in keys:
        await call(channel, f"{SNAPSHOTS}/Remove", snapshots.RemoveSnapshotRequest(snapshotter=name, key=key))


@pytest.mark.parametrize("name", ["overlayfs", "native"])
async def test_a_snapshot_lives_in_every_snapshotter(channel: grpc.aio.Channel, name: str) -> None:
    (mount,) = await prepare(channel, "life", name=name)
    assert mount.type == "bind"
    (Path(mount.source) / "file").write_text("x" * 5000)
    found = await stat(channel, "life", name)
    assert (found.name, found.parent, found.kind) == ("life", "", snapshots.ACTIVE)
    again = snapshots.MountsRequest(snapshotter=name, key="life")
    reply = await call(channel, f"{SNAPSHOTS}/Mounts", again, snapshots.MountsResponse)
    assert list(reply.mounts) == [mount]
    usage = snapshots.UsageRequest(snapshotter=name, key="life")
    used = await call(channel, f"{SNAPSHOTS}/Usage", usage, snapshots.UsageResponse)
    assert (used.size >= 5000, used.inodes) == (True, 2)
    await commit(channel, "base", "life", name, labels={"a": "b", **ROOT})
    found = await stat(channel, "base", name)
    assert (found.kind, dict(found.labels)) == (snapshots.COMMITTED, {"a": "b", **ROOT})
    view = snapshots.ViewSnapshotRequest(snapshotter=name, key="view", parent="base")
    reply = await call(channel, f"{SNAPSHOTS}/View", view, snapshots.ViewSnapshotResponse)
    assert any("ro" in one.options for one in reply.mounts)
    code, message = await refused(
        channel, f"{SNAPSHOTS}/Remove", snapshots.RemoveSnapshotRequest(snapshotter=name, key="base")
    )
    assert (code, message) == ("FAILED_PRECONDITION", "cannot remove snapshot with child: failed precondition")
    changed = snapshots.UpdateSnapshotRequest(
        snapshotter=name, info=snapshots.Info(name="base", labels={"a": "", "c": "d"})
    )
    changed.update_mask.paths.extend(["labels.a", "labels.c"])
    reply = await call(channel, f"{SNAPSHOTS}/Update", changed, snapshots.UpdateSnapshotResponse)
    assert dict(reply.info.labels) == {"c": "d", **ROOT}
    stream = channel.unary_stream(f"{SNAPSHOTS}/List")(
        snapshots.ListSnapshotsRequest(snapshotter=name, filters=["parent==base", "name==base"]).SerializeToString(),
        metadata=IN,
    )
    batches = [snapshots.ListSnapshotsResponse.FromString(data) async for data in stream]
    assert [info.name for batch in batches for info in batch.info] == ["base", "view"]
    await remove(channel, "view", "base", name=name)
    await call(channel, f"{SNAPSHOTS}/Cleanup", snapshots.CleanupRequest(snapshotter=name))


async def test_what_a_client_is_to_commit_needs_no_preparing_where_it_is(channel: grpc.aio.Channel) -> None:
    await prepare(channel, "first")
    await commit(channel, "chain", "first", labels=ROOT)
    await call(channel, f"{LEASES}/Create", leases.CreateRequest(id="finds"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await prepare(channel, "second", lease="finds", **{"containerd.io/snapshot.ref": "chain"})
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    request = leases.ListResourcesRequest(id="finds")
    reply = await call(channel, f"{LEASES}/ListResources", request, leases.ListResourcesResponse)
    assert ("snapshots/overlayfs", "chain") in {(one.type, one.id) for one in reply.resources}
    await prepare(channel, "third", **{"containerd.io/snapshot.ref": "not there"})
    await remove(channel, "third", "chain")
    await call(channel, f"{LEASES}/Delete", leases.DeleteRequest(id="finds", sync=True))


async def test_a_parent_is_laid_under_a_snapshot_as_it_is_committed(channel: grpc.aio.Channel) -> None:
    for name in ("overlayfs", "native"):
        await prepare(channel, "lower-1", name=name)
        await commit(channel, "lower", "lower-1", name, labels=ROOT)
        await prepare(channel, "upper-1", name=name)
        if name == "native":
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await commit(channel, "upper", "upper-1", name, parent="lower")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            await remove(channel, "upper-1", "lower", name=name)
            continue
        await commit(channel, "upper", "upper-1", name, parent="lower", labels=ROOT)
        assert (await stat(channel, "upper")).parent == "lower"
        await remove(channel, "upper", "lower")


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Stat", snapshots.StatSnapshotRequest(snapshotter="overlayfs", key="none"), "NOT_FOUND"),
        ("Stat", snapshots.StatSnapshotRequest(snapshotter="overlayfs"), "NOT_FOUND"),
        ("Stat", snapshots.StatSnapshotRequest(key="x"), "INVALID_ARGUMENT"),
        ("Stat", snapshots.StatSnapshotRequest(snapshotter="x" * 5000, key="x"), "INVALID_ARGUMENT"),
        ("Stat", snapshots.StatSnapshotRequest(snapshotter="none", key="x"), "INVALID_ARGUMENT"),
        ("Stat", snapshots.StatSnapshotRequest(snapshotter="a.b/*>", key="x"), "INVALID_ARGUMENT"),
        ("Prepare", snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key="x", parent="none"), "NOT_FOUND"),
        ("Prepare", snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key="x" * 2000), "INVALID_ARGUMENT"),
        ("Prepare", snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key="x", labels={"k": "v" * 4096}),
         "INVALID_ARGUMENT"),
        ("Commit", snapshots.CommitSnapshotRequest(snapshotter="overlayfs", name="a", key="none"), "NOT_FOUND"),
        ("Mounts", snapshots.MountsRequest(snapshotter="overlayfs", key="none"), "NOT_FOUND"),
        ("Usage", snapshots.UsageRequest(snapshotter="overlayfs", key="none"), "NOT_FOUND"),
        ("Remove", snapshots.RemoveSnapshotRequest(snapshotter="overlayfs", key="none"), "NOT_FOUND"),
        ("Update", snapshots.UpdateSnapshotRequest(snapshotter="overlayfs", info=snapshots.Info(name="none")),
         "NOT_FOUND"),
    ],
)  # fmt: skip
async def test_bad_requests_have_containerds_codes(
    channel: grpc.aio.Channel, method: str, request_: Any, code: str
) -> None:
    assert (await refused(channel, f"{SNAPSHOTS}/{method}", request_))[0] == code


# ----------------------------------------------------------------------------------------------------------- layers


def layer_of(**files: str) -> tuple[bytes, bytes]:
    """A layer, compressed and as it is."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return gzip.compress(plain.getvalue()), plain.getvalue()


async def test_a_layer_is_applied_and_comes_back_as_a_diff(channel: grpc.aio.Channel) -> None:
    packed, plain = layer_of(hello="hello\n", more="more\n")
    blob = await put(channel, packed)
    blob.media_type = LAYER
    target = await prepare(channel, "applied")
    applied = await call(channel, f"{DIFF}/Apply", diff.ApplyRequest(diff=blob, mounts=target, sync_fs=True),
                         diff.ApplyResponse)  # fmt: skip
    assert applied.applied.digest == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    assert (applied.applied.media_type, applied.applied.size) == ("application/vnd.oci.image.layer.v1.tar", len(plain))
    assert (Path(target[0].source) / "hello").read_text() == "hello\n"
    await commit(channel, "base", "applied", labels=ROOT)
    upper = await prepare(channel, "upper", "base")
    directory = next(one for one in upper[0].options if one.startswith("upperdir=")).removeprefix("upperdir=")
    (Path(directory) / "added").write_text("added\n")
    view = snapshots.ViewSnapshotRequest(snapshotter="overlayfs", key="lower", parent="base")
    lower = (await call(channel, f"{SNAPSHOTS}/View", view, snapshots.ViewSnapshotResponse)).mounts
    request = diff.DiffRequest(
        left=lower, right=upper, ref="diffed", labels={"a": "b"}, source_date_epoch=Timestamp(seconds=1_000_000_000)
    )
    made = (await call(channel, f"{DIFF}/Diff", request, diff.DiffResponse)).diff
    assert made.media_type == LAYER
    stream = channel.unary_stream(f"{CONTENT}/Read")(
        content.ReadContentRequest(digest=made.digest).SerializeToString(), metadata=IN
    )
    data = b"".join([content.ReadContentResponse.FromString(one).data async for one in stream])
    assert len(data) == made.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {(entry.name, entry.mtime) for entry in tar if entry.isfile()} == {("added", 1_000_000_000)}
    info = await call(channel, f"{CONTENT}/Info", content.InfoRequest(digest=made.digest), content.InfoResponse)
    assert info.info.labels["a"] == "b"
    assert info.info.labels["containerd.io/uncompressed"].startswith("sha256:")
    await remove(channel, "upper", "lower", "base")
    for digest in (made.digest, blob.digest):
        await call(channel, f"{CONTENT}/Delete", content.DeleteContentRequest(digest=digest))


async def test_a_payload_comes_to_the_stream_processor_that_it_is_for(
    node: TestNode, channel: grpc.aio.Channel
) -> None:
    """At its file descriptor 3, as protobuf's Any; the layer is what that makes of it."""
    packed, plain = layer_of(secret="hidden\n")
    payload = AnyMessage(type_url="shoal/key", value=b"k3y-" * 20_000)
    sealed = await put(channel, payload.SerializeToString() + packed)
    sealed.media_type = SEALED
    target = await prepare(channel, "sealed")
    wrong = {"io.containerd.test.unseal": AnyMessage(value=b"another"), "other": payload}
    for payloads in (wrong, {}):
        request = diff.ApplyRequest(diff=sealed, mounts=target, payloads=payloads)
        assert (await refused(channel, f"{DIFF}/Apply", request))[0] == "DATA_LOSS"
    request = diff.ApplyRequest(diff=sealed, mounts=target, payloads={"io.containerd.test.unseal": payload})
    applied = await call(channel, f"{DIFF}/Apply", request, diff.ApplyResponse)
    assert applied.applied.digest == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    assert (Path(target[0].source) / "secret").read_text() == "hidden\n"
    assert list((node.state / "payloads").iterdir()) == []
    for path in node.directory.rglob("*"):
        if path.is_file() and "content" not in path.parts:
            assert b"k3y-k3y-" not in path.read_bytes(), path
    await remove(channel, "sealed")
    await call(channel, f"{CONTENT}/Delete", content.DeleteContentRequest(digest=sealed.digest))


async def test_layers_that_cant_be_applied_or_computed_are_refused(channel: grpc.aio.Channel) -> None:
    mounts_ = await prepare(channel, "refuses")
    text = await put(channel, b"no layer at all")
    text.media_type = LAYER
    gone = Descriptor(media_type=LAYER, digest=GONE, size=5)
    encrypted = Descriptor(media_type=f"{LAYER}+encrypted", digest=text.digest, size=text.size)
    elsewhere = [Mount(type="bind", source="/tmp", options=["rw", "rbind"])]
    for method, request, code in (
        ("Apply", diff.ApplyRequest(diff=gone, mounts=mounts_), "NOT_FOUND"),
        ("Apply", diff.ApplyRequest(diff=text, mounts=mounts_), "DATA_LOSS"),
        ("Apply", diff.ApplyRequest(diff=text, mounts=elsewhere), "NOT_FOUND"),
        ("Apply", diff.ApplyRequest(diff=text), "INVALID_ARGUMENT"),
        ("Apply", diff.ApplyRequest(mounts=mounts_), "INVALID_ARGUMENT"),
        (
            "Apply",
            diff.ApplyRequest(diff=encrypted, mounts=mounts_, payloads={"no": AnyMessage()}),
            "FAILED_PRECONDITION",
        ),
        ("Diff", diff.DiffRequest(right=elsewhere), "NOT_FOUND"),
        ("Diff", diff.DiffRequest(right=mounts_, media_type="text/plain"), "UNIMPLEMENTED"),
    ):
        assert (await refused(channel, f"{DIFF}/{method}", request))[0] == code, request
    assert not any(Path(mounts_[0].source).iterdir())
    await remove(channel, "refuses")
    await call(channel, f"{CONTENT}/Delete", content.DeleteContentRequest(digest=text.digest))


async def test_a_client_that_goes_away_has_its_layer_undone(channel: grpc.aio.Channel) -> None:
    packed, _ = layer_of(**{f"file-{number}": "x" * 100 for number in range(20_000)})
    blob = await put(channel, packed)
    blob.media_type = LAYER
    target = await prepare(channel, "left")
    root = Path(target[0].source)
    request = diff.ApplyRequest(diff=blob, mounts=target)
    applying = asyncio.create_task(call(channel, f"{DIFF}/Apply", request))
    async with asyncio.timeout(20):
        while not any(root.iterdir()):
            await asyncio.sleep(0.001)
    applying.cancel()
    async with asyncio.timeout(20):
        while any(root.iterdir()):
            await asyncio.sleep(0.05)
    applied = await call(channel, f"{DIFF}/Apply", request, diff.ApplyResponse)
    assert applied.applied.digest
    assert len(list(root.iterdir())) == 20_000
    await remove(channel, "left")
    await call(channel, f"{CONTENT}/Delete", content.DeleteContentRequest(digest=blob.digest))
