"""`gc` and `lease`, as a person at a shell has them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.node import find

from tests.e2e.shoal import Shoal, eventually, refused, unique
from tests.support import images
from tests.support.registry import Registry


def test_what_a_lease_holds_outlives_its_image_and_then_goes(node: Shoal, registry: Registry) -> None:
    one = images.push(images.busybox_image(cmd=[unique("cmd")]), registry.host, "leased")
    lease = node.ok("lease", "create", "--label", "for=test").strip()
    digest = node.json("pull", one)["target"]["digest"]
    assert node.ok("lease", "add", lease, f"content={digest}") == f"content={digest}\n"
    assert node.ok("lease", "resources", lease).split() == ["TYPE", "ID", "content", digest]
    node.ok("rmi", one)
    assert node.ok("gc").startswith("removed nothing, 0 B, in ")
    assert node.ok("lease", "rm", "--sync", lease) == f"{lease}\n"
    assert node.json("gc")["counts"] == {}
    refused(node.run("lease", "resources", lease), 4, "NOT_FOUND", lease)


def held_by(node: Shoal, lease: str) -> dict[str, list[str]]:
    """What a lease holds by name: ids by type."""
    found: dict[str, list[str]] = {}
    for one in node.json("lease", "resources", lease):
        found.setdefault(one["type"], []).append(one["id"])
    return found


def goes_with_its_lease(node: Shoal, lease: str, digest: str, *names: str) -> None:
    """Without their names, what a lease holds is there, whole; without the lease it is gone."""
    if names:
        node.ok("rmi", *names)
    node.ok("gc")
    assert node.run("content", "get", digest).returncode == 0
    node.ok("lease", "rm", "--sync", lease)
    node.ok("gc")
    refused(node.run("content", "get", digest), 4, "NOT_FOUND", digest)


def test_what_is_pulled_under_a_lease_outlives_its_name(node: Shoal, registry: Registry) -> None:
    image = images.busybox_image(cmd=[unique("cmd")])
    one = images.push(image, registry.host, "pulled-under-a-lease")
    lease = node.ok("lease", "create").strip()
    digest = node.json("pull", "--lease", lease, one)["target"]["digest"]
    held = held_by(node, lease)
    assert {digest, *image.blobs} <= set(held["content"])
    assert held["images"] == [one]
    assert len(held["snapshots/overlayfs"]) == 1
    node.ok("rmi", one)
    node.ok("gc")
    assert node.ok("snapshot", "info", held["snapshots/overlayfs"][0])
    goes_with_its_lease(node, lease, digest)
    assert held["snapshots/overlayfs"][0] not in node.ok("snapshot", "ls")


def test_what_is_run_under_a_lease_leaves_its_image_to_that(node: Shoal, registry: Registry) -> None:
    one = images.push(images.busybox_image(cmd=["echo", unique("cmd")]), registry.host, "run-under-a-lease")
    for attempt in ("pulled for it", "there already"):
        lease = node.ok("lease", "create").strip()
        if attempt == "there already":
            node.ok("pull", one)
        assert node.ok("run", "--rm", "--lease", lease, one).startswith("cmd")
        goes_with_its_lease(node, lease, node.json("inspect", one)["image"]["target"]["digest"], one)


def test_what_is_loaded_converted_or_unpacked_under_a_lease_is_held_by_it(
    node: Shoal, registry: Registry, tmp_path: Path
) -> None:
    one = images.push(images.busybox_image(cmd=[unique("cmd")]), registry.host, "loaded-under-a-lease")
    digest = node.json("pull", one)["target"]["digest"]
    node.ok("save", "-o", str(tmp_path / "image.tar"), one)
    node.ok("rmi", one)
    node.ok("gc")
    lease = node.ok("lease", "create").strip()
    assert node.json("load", "-i", str(tmp_path / "image.tar"), "--no-unpack", "--lease", lease)[0]["name"] == one
    assert "snapshots/overlayfs" not in held_by(node, lease)
    node.ok("image", "unpack", "--lease", lease, one)
    assert len(held_by(node, lease)["snapshots/overlayfs"]) == 1
    others = node.ok("lease", "create").strip()
    converted = node.json("convert", "--zstd", "--lease", others, one, "localhost/converted:1")["target"]["digest"]
    goes_with_its_lease(node, others, converted, "localhost/converted:1")
    goes_with_its_lease(node, lease, digest, one)


def test_a_blob_put_under_a_lease_has_that_instead_of_a_label(node: Shoal) -> None:
    lease = node.ok("lease", "create").strip()
    digest = node.ok("content", "put", "--lease", lease, stdin=unique("blob").encode()).strip()
    assert held_by(node, lease) == {"content": [digest]}
    goes_with_its_lease(node, lease, digest)


def test_a_lease_that_is_not_there_is_told_before_anything_is_done(
    node: Shoal, busybox: str, registry: Registry, tmp_path: Path
) -> None:
    node.ok("pull", busybox)
    node.ok("save", "-o", str(tmp_path / "image.tar"), busybox)
    before = node.json("images")
    new = images.push(images.busybox_image(cmd=[unique("cmd")]), registry.host, "under-no-lease")
    for command, status in [
        (["pull", new], 4),
        (["run", "--rm", new, "true"], 125),
        (["run", "--rm", busybox, "true"], 125),
        (["load", "-q", "-i", str(tmp_path / "image.tar")], 4),
        (["convert", "-q", "--zstd", busybox, "localhost/other:1"], 4),
        (["image", "unpack", busybox], 4),
        (["content", "put", "/etc/hostname"], 4),
    ]:
        at = 2 if command[0] in ("image", "content") else 1
        done = node.run(*command[:at], "--lease", "nowhere", *command[at:])
        assert done.returncode == status, done.stderr
        assert "lease nowhere: not found" in done.stderr
    assert node.json("images") == before


def test_leases_are_listed_with_their_end(node: Shoal) -> None:
    id = unique("lease")
    made = node.json("lease", "create", id, "--expire", "10m", "--flat")
    left = datetime.fromisoformat(made["labels"]["containerd.io/gc.expire"]) - datetime.now(UTC)
    assert 590 < left.total_seconds() < 601
    assert made["labels"]["containerd.io/gc.flat"] == "true"
    node.ok("lease", "create", f"{id}-ever", "--expire", "never")
    listed = {line.split()[0]: line for line in node.ok("lease", "ls").splitlines()}
    assert " never" in listed[f"{id}-ever"]
    assert " +00:00" not in listed[id]
    assert [one["id"] for one in node.json("lease", "ls", "--filter", f"id=={id}")] == [id]
    node.ok("lease", "rm", id, f"{id}-ever")
    eventually(lambda: id not in node.ok("lease", "ls"))


def test_what_makes_no_sense_is_refused_with_its_mend(node: Shoal) -> None:
    refused(node.run("lease", "create", "--expire", "soon"), 2, "INVALID_ARGUMENT", "24h")
    refused(node.run("lease", "add", "x", "content"), 2, "INVALID_ARGUMENT", "TYPE=ID")
    refused(node.run("lease", "add", "x", "content=short"), 2, "INVALID_ARGUMENT", "digest")
    refused(node.run("lease", "add", "x", "tasks=y"), 2, "INVALID_ARGUMENT", "snapshots/<snapshotter>")
    refused(node.run("lease", "add", "nowhere", "images=y"), 4, "NOT_FOUND", "nowhere")
    refused(node.run("lease", "rm", "nowhere"), 4, "NOT_FOUND", "nowhere")


async def test_gc_says_what_it_has_removed(node: Shoal) -> None:
    found = find(state=node.state)
    node.ok("lease", "create", "holds")
    node.ok("lease", "add", "holds", "images=a", "ingests=b")
    node.ok("lease", "drop", "holds", "images=a")
    assert node.json("lease", "resources", "holds") == [{"type": "ingests", "id": "b"}]
    node.ok("gc")
    for number in range(5):
        async with Client.open(found.address, found.name) as client:
            request = content.WriteIngest(ref="r", data=b"of nobody%d" % number, commit=True)
            written = await client.call(content.INGEST_WRITE, request)
        told = node.ok("gc").splitlines()
        if len(told) > 1:
            break  # otherwise another collection was faster
    assert told[0] == f"default content {written.committed}"
    assert told[1].startswith("removed 1 content, 10 B, in ")
