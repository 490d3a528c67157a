"""`shoal content`, `shoal snapshot` and `shoal mounts`, as a person at a shell and a program have them."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.node import find
from shoal_bus.types import Mount

from tests.e2e.shoal import COMMAND, Shoal, eventually, refused, unique

DATA = os.urandom(5 << 20)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blob(node: Shoal) -> str:
    """The digest of `DATA`, which the node has."""
    assert node.ok("content", "put", "--label", "app=web", stdin=DATA).strip() == DIGEST
    return DIGEST


def of_namespace() -> str:
    """A namespace that no other test of this node has."""
    return unique("storage")


def path_of(node: Shoal, digest: str) -> Path:
    return node.root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_a_blob_is_put_listed_labelled_read_and_removed(node: Shoal, blob: str, tmp_path: Path) -> None:
    assert blob in node.ok("content", "ls", "-q").split()
    line = next(line for line in node.ok("content", "ls").splitlines() if blob in line)
    assert "5.0 MiB" in line
    assert "app=web" in line
    printed = node.ok("content", "label", blob[7:20], "app=", "tier=front").split()
    assert [line.partition("=")[0] for line in printed] == ["containerd.io/gc.root", "tier"]
    assert node.ok("content", "label", blob, "containerd.io/gc.root=x").split() == [
        "containerd.io/gc.root=x",
        "tier=front",
    ]
    (listed,) = node.json("content", "ls", "--filter", "labels.tier==front")
    assert (listed["digest"], listed["size"], listed["labels"]) == (
        blob, len(DATA), {"tier": "front", "containerd.io/gc.root": "x"},
    )  # fmt: skip
    reading = node.spawn("content", "get", blob, stdout=subprocess.PIPE)
    assert reading.communicate(timeout=60)[0] == DATA
    out = tmp_path / "out"
    node.ok("content", "get", blob[:15], "-o", str(out))
    assert out.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [out]
    file = tmp_path / "in"
    file.write_bytes(DATA)
    assert node.ok("content", "put", str(file)).strip() == blob  # it is there already
    assert node.json("content", "put", str(file), "--expected", blob) == {"digest": blob}
    assert node.ok("content", "rm", blob) == f"{blob}\n"
    node.ok("content", "put", str(file), "--temporary")
    assert node.json("content", "ls", "--filter", f"digest=={blob}")[0]["labels"] == {}
    node.ok("content", "rm", blob)
    refused(node.run("content", "rm", blob), 4, "NOT_FOUND", blob)
    refused(node.run("content", "get", blob), 4, "NOT_FOUND")


def test_a_read_that_was_broken_off_is_gone_on_with(node: Shoal, blob: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part = tmp_path / f".out.{blob[7:23]}.part"
    part.write_bytes(DATA[: 3 << 20])
    node.ok("content", "get", blob, "-o", str(out))
    assert out.read_bytes() == DATA
    part.write_bytes(b"x" + DATA[1 : 3 << 20])  # not what it is the beginning of
    refused(node.run("content", "get", blob, "-o", str(out)), 10, "DATA_LOSS")
    node.ok("content", "get", blob, "-o", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_write_whose_command_was_killed_is_gone_on_with(node: Shoal) -> None:
    namespace, data = of_namespace(), os.urandom(20 << 20)
    writing = node.spawn("content", "put", "--ref", "mine", "-n", namespace, stdin=subprocess.PIPE)
    assert writing.stdin is not None
    writing.stdin.write(data[: 12 << 20])
    writing.stdin.flush()
    ends = time.monotonic() + 30
    while not (found := node.json("content", "ingests", "-n", namespace)) or found[0]["offset"] < 10 << 20:
        assert time.monotonic() < ends
        time.sleep(0.05)
    refused(
        node.run("content", "put", "--ref", "mine", "-n", namespace, stdin=data), 3, "UNAVAILABLE", "another writer"
    )
    writing.kill()
    writing.wait()
    writing.stdin.close()
    assert "mine" in node.ok("content", "ingests", "-n", namespace)
    node.ok("content", "abort", "mine", "-n", namespace)
    assert node.json("content", "ingests", "-n", namespace) == []
    digest = node.ok("content", "put", "--ref", "mine", "-n", namespace, stdin=data).strip()
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_scrub_says_what_is_damaged_and_exits_with_10(node: Shoal) -> None:
    namespace = of_namespace()
    first, second = (node.ok("content", "put", "-n", namespace, stdin=os.urandom(70_000)).strip() for _ in range(2))
    assert node.ok("content", "scrub", "-n", namespace) == "2 blobs, 136.7 KiB: all sound\n"
    with path_of(node, first).open("r+b") as file:
        file.write(b"damaged")
    assert node.run("content", "scrub", "-n", namespace, second).returncode == 0
    done = node.run("content", "scrub", "-n", namespace)
    assert (done.returncode, done.stderr) == (10, "")
    assert first in done.stdout
    assert second not in done.stdout
    assert "rotten" in node.ok("content", "ls", "-n", namespace, "--filter", f"digest=={first}")
    refused(node.run("content", "get", "-n", namespace, first), 10, "DATA_LOSS", "damaged", "again")


@pytest.mark.parametrize(
    ("arguments", "status", "code", "word"),
    [
        (("get", "nonsense"), 2, "INVALID_ARGUMENT", "digest"),
        (("get", "0000000000"), 4, "NOT_FOUND", "0000000000"),
        (("ls", "--filter", "digest=="), 2, "INVALID_ARGUMENT", "filter"),
        (("label", DIGEST, "nothing"), 2, "INVALID_ARGUMENT", "KEY=VALUE"),
        (("put", "/no/such/file"), 4, "NOT_FOUND", "no such file"),
        (("put", "/"), 4, "NOT_FOUND", "directory"),
        (("put", "--expected", "sha256:1"), 2, "INVALID_ARGUMENT", "--expected"),
        (("abort", "none"), 4, "NOT_FOUND", "none"),
        (("scrub", "sha256:" + "0" * 64), 4, "NOT_FOUND", "0000"),
    ],
)
def test_what_can_not_be_done_with_content_is_one_line(
    node: Shoal, arguments: tuple[str, ...], status: int, code: str, word: str
) -> None:
    refused(node.run("content", *arguments), status, code, word)


def test_what_a_blob_is_not_is_refused_and_no_place_is_no_file(node: Shoal, blob: str, tmp_path: Path) -> None:
    other = "sha256:" + "1" * 64
    refused(node.run("content", "put", "--expected", other, stdin=b"x"), 7, "FAILED_PRECONDITION", other)
    refused(node.run("content", "get", blob, "-o", str(tmp_path / "no" / "file")), 4, "NOT_FOUND", "no such file")
    refused(node.run("content", "get", blob, "-o", str(tmp_path)), 4, "NOT_FOUND", "directory")


def test_snapshots_are_listed_as_a_tree_measured_and_removed_from_the_top(node: Shoal, image: str) -> None:
    listed = node.json("snapshot", "ls")
    base = next(one["key"] for one in listed if one["kind"] == "committed" and not one["parent"])
    id = unique("snap")
    node.ok("run", "-d", "--name", id, image, "sh", "-c", "echo hi > /written; sleep 1000")
    try:
        (own,) = [one for one in node.json("snapshot", "ls", "--filter", f"parent=={base}") if id in one["key"]]
        assert own["kind"] == "active"
        tree = node.ok("snapshot", "tree").splitlines()
        assert tree.index(base) < tree.index(next(line for line in tree if own["key"] in line))
        assert any(line.endswith(f"─ {own['key']} (active)") for line in tree)
        told = node.json("snapshot", "info", own["key"])
        assert (told["parent"], told["mounts"][0]["type"]) == (base, "overlay")
        assert told["usage"]["inodes"] > 1
        assert node.json("snapshot", "info", base)["mounts"] == []
        used = {row["key"]: row for row in node.json("snapshot", "usage")}
        assert used[base]["size"] > 100_000
        assert own["key"] in node.ok("snapshot", "usage", own["key"])
        refused(node.run("snapshot", "rm", base), 7, "FAILED_PRECONDITION", own["key"])
    finally:
        node.ok("rm", "--force", id)
    refused(node.run("snapshot", "info", own["key"]), 4, "NOT_FOUND", own["key"])
    refused(node.run("snapshot", "usage", "none"), 4, "NOT_FOUND", "none")


def test_snapshots_are_removed_in_the_order_given(node: Shoal, image: str) -> None:
    keys = [one["key"] for one in node.json("snapshot", "ls") if one["kind"] == "committed"]
    done = node.run("snapshot", "rm", "none", *keys)
    assert done.returncode == 4
    assert done.stdout.split() == keys
    assert node.json("snapshot", "ls") == []
    node.ok("rmi", image)
    node.ok("pull", image)


def test_what_a_container_changed_is_a_layer(node: Shoal, image: str, tmp_path: Path) -> None:
    id = unique("changes")
    node.ok("run", "--name", id, image, "sh", "-c", "echo new >/added; rm /bin/true")
    before = {one["key"] for one in node.json("snapshot", "ls")}
    [key] = [key for key in before if id in key]
    file = tmp_path / "changes.tar"
    told = node.json("snapshot", "diff", key, "-o", str(file))
    assert told["diff_id"] == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    with tarfile.open(file) as archive:
        names = {member.name.strip("./") for member in archive if member.isreg()}
        added = archive.extractfile("added")
        assert added is not None
        assert added.read() == b"new\n"
    assert {"added", "bin/.wh.true"} <= names
    piped = subprocess.run(
        [*COMMAND, "snapshot", "diff", key, "--compression", "gzip"],
        env=node.environment,
        capture_output=True,
        check=True,
    )
    assert gzip.decompress(piped.stdout) == file.read_bytes()
    # Of committed ones, and against another than the parent: what the container shows is all that it shows.
    [parent] = [one["parent"] for one in node.json("snapshot", "ls") if one["key"] == key]
    node.ok("snapshot", "diff", parent, "-o", str(tmp_path / "image.tar"))
    with tarfile.open(tmp_path / "image.tar") as archive:
        assert "bin/busybox" in {member.name.strip("./") for member in archive}
    assert {one["key"] for one in node.json("snapshot", "ls")} == before
    eventually(lambda: told["descriptor"]["digest"] not in node.ok("gc", "--json") + node.ok("content", "ls", "-q"))
    assert node.json("lease", "ls") == []
    refused(node.run("snapshot", "diff", "nothing", "-o", str(file)), 4, "NOT_FOUND", "nothing")
    refused(node.run("snapshot", "diff", key, "--compression", "rot13", "-o", "x"), 2, "INVALID_ARGUMENT", "rot13")
    node.ok("rm", id)


async def test_what_is_mounted_is_listed_shown_and_taken_away(node: Shoal, tmp_path: Path) -> None:
    name = unique("mount")
    mounts = [Mount(type="tmpfs", source="tmpfs"), Mount(type="format/bind", source="{{ mount 0 }}")]
    found = find(state=node.state)
    async with Client.open(found.address, found.name) as client:
        await client.call(runtime.MOUNT_ACTIVATE, runtime.ActivateMounts(name=name, mounts=mounts))
    assert node.ok("mounts", "ls", "--filter", f"name=={name}").split()[:6] == [
        "NAME", "ACTIVE", "LEASE", "CREATED", name, "tmpfs",
    ]  # fmt: skip
    told = node.json("mounts", "info", name)
    assert told["system"][0]["source"] == told["active"][0]["mount_point"]
    assert Path(told["active"][0]["mount_point"]).is_mount()
    assert node.ok("mounts", "rm", name) == f"{name}\n"
    assert not Path(told["active"][0]["mount_point"]).exists()
    refused(node.run("mounts", "info", name), 4, "NOT_FOUND", name)
    refused(node.run("mounts", "rm", name), 4, "NOT_FOUND", name)
    assert node.json("mounts", "ls") == []
