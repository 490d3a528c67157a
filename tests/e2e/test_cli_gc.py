"""`gc` and `lease`, as a person at a shell has them."""

from __future__ import annotations

from datetime import UTC, datetime

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
