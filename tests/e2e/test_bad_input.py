"""What people and registries get wrong: one line, the canonical code, and nothing left behind."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.shoal import Shoal, eventually
from tests.support import images
from tests.support.bad_registry import in_front_of, truncated, wrong_bytes
from tests.support.natsd import free_port
from tests.support.registry import Registry


def refused(done: subprocess.CompletedProcess[str], code: str, *words: str) -> None:
    """A command that failed as it should: a status that isn't 0, and one line, the last, with the code and the words.

    A pull may have told of its progress before.
    """
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("shoal: ")]
    assert errors == done.stderr.splitlines()[-1:], done.stderr
    assert errors[0].endswith(f"[{code}]"), done.stderr
    for word in words:
        assert word in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def things_of(node: Shoal) -> tuple[list[str], list[str], list[str]]:
    """What a node has on disk besides databases and the bus's own, and what it lists."""
    content, snapshots = node.root / "content", node.root / "snapshot"
    files = [str(p) for p in content.rglob("*") if p.is_file() and "metadata.db" not in p.name]
    directories = [str(p) for p in (snapshots / "overlayfs").rglob("*") if p.parent.name == "snapshots"]
    listed = [image["name"] for image in node.json("images")] + [c["id"] for c in node.json("ps", "--all")]
    return sorted(files), sorted(directories), sorted(listed)


@pytest.fixture
def unchanged(node: Shoal, image: str) -> Iterator[None]:
    """The node has afterwards what it had before."""
    before = things_of(node)
    yield
    assert things_of(node) == before


@pytest.fixture(scope="module")
def victim(registry: Registry) -> images.Image:
    """An image of its own for damage, of two layers."""
    layers = [images.busybox_layer(), images.Layer([images.file("data", secrets.token_bytes(300_000))])]
    built = images.Image.build(layers, config={"Cmd": ["true"]})
    images.push(built, registry.host, "victim", "latest")
    return built


pytestmark = pytest.mark.usefixtures("unchanged")


def test_an_image_that_no_registry_has(node: Shoal, registry: Registry) -> None:
    refused(node.run("pull", f"{registry.host}/no/such:image"), "NOT_FOUND", "no/such")


def test_an_image_that_was_never_pulled(node: Shoal) -> None:
    refused(node.run("inspect", "never-pulled:1"), "NOT_FOUND")


def test_a_reference_that_is_none(node: Shoal) -> None:
    refused(node.run("pull", "UPPER/Case:tag:tag"), "INVALID_ARGUMENT")


def test_a_registry_that_nobody_runs(node: Shoal) -> None:
    host = f"127.0.0.1:{free_port()}"
    refused(node.run("pull", f"{host}/any:1"), "UNAVAILABLE", host)


def test_a_layer_of_other_bytes(node: Shoal, registry: Registry, victim: images.Image) -> None:
    with in_front_of(registry.host, wrong_bytes(victim.layers[1])) as host:
        refused(node.run("pull", f"{host}/victim:latest"), "DATA_LOSS", victim.layers[1])


def test_a_manifest_of_other_bytes(node: Shoal, registry: Registry, victim: images.Image) -> None:
    with in_front_of(registry.host, wrong_bytes("/manifests/")) as host:
        refused(node.run("pull", f"{host}/victim@{victim.digest}"), "DATA_LOSS", victim.digest)


def test_a_layer_that_ends_too_early(node: Shoal, registry: Registry, victim: images.Image) -> None:
    with in_front_of(registry.host, truncated(victim.layers[1])) as host:
        refused(node.run("pull", f"{host}/victim:latest"), "DATA_LOSS", victim.layers[1])


def test_a_layer_whose_archive_ends_too_early(node: Shoal, registry: Registry) -> None:
    tar = images.Layer([images.file("data", secrets.token_bytes(100_000))], "none").tar()[:50_000]
    built = images.Image.build([images.Layer([images.file("x")])], config={})
    data = images.Layer.compress(tar, "gzip")
    old, diff = built.layers[0], built.diff_ids[0]
    manifest = built.manifest.replace(old.encode(), images.digest_of(data).encode())
    manifest = manifest.replace(f'"size": {len(built.blobs[old][1])}}}]'.encode(), f'"size": {len(data)}}}]'.encode())
    config_digest = next(d for d, (kind, _) in built.blobs.items() if "config" in kind)
    kind, config = built.blobs.pop(config_digest)
    config = config.replace(diff.encode(), images.digest_of(tar).encode())
    manifest = manifest.replace(config_digest.encode(), images.digest_of(config).encode())
    layer_kind = built.blobs.pop(old)[0]
    built.blobs |= {images.digest_of(config): (kind, config), images.digest_of(data): (layer_kind, data)}
    built.manifest = manifest
    reference = images.push(built, registry.host, "cut", "latest")
    refused(node.run("pull", reference), "DATA_LOSS")


def test_a_platform_that_is_not_offered(node: Shoal, registry: Registry) -> None:
    offered = [images.Image.build([images.busybox_layer()], architecture=one) for one in ("amd64", "arm64")]
    reference = images.push(images.Image.index(offered), registry.host, "platforms", "latest")
    refused(node.run("pull", "--platform", "linux/s390x", reference), "NOT_FOUND", "s390x", "arm64")
    refused(node.run("pull", "--platform", "a/b/c/d", reference), "INVALID_ARGUMENT")


def test_a_container_id_that_is_none(node: Shoal, image: str) -> None:
    refused(node.run("run", "--name", "no good!", image), "INVALID_ARGUMENT")
    refused(node.run("run", "--name", "x" * 80, image), "INVALID_ARGUMENT")


def test_a_name_that_is_taken(node: Shoal, image: str) -> None:
    name = f"taken-{secrets.token_hex(3)}"
    node.ok("run", "-d", "--name", name, image, "sleep", "60")
    refused(node.run("run", "-d", "--name", name, image, "sleep", "60"), "ALREADY_EXISTS", name)
    node.ok("rm", "--force", name)


def test_a_runtime_that_is_not_installed(node: Shoal, image: str) -> None:
    done = node.run("run", "--rm", "--runtime", "no-such-runc", image)
    refused(done, "FAILED_PRECONDITION", "no-such-runc")


def test_a_command_that_the_image_has_not(node: Shoal, image: str) -> None:
    refused(node.run("run", "--rm", image, "no-such-command"), "FAILED_PRECONDITION", "no-such-command")


def test_a_bridge_without_an_address(node: Shoal, image: str) -> None:
    done = node.run("run", "--rm", "--net", "bridge", image)
    assert done.returncode != 0
    assert "--ip" in done.stderr


def test_a_container_that_is_not_there(node: Shoal) -> None:
    for arguments in (["kill", "nobody"], ["stop", "nobody"], ["rm", "nobody"], ["inspect", "nobody"]):
        refused(node.run(*arguments), "NOT_FOUND", "nobody")


# Everything is loaded first: another user may not be able to read the directory this is tested in.
AS_NOBODY = """
import os, pkgutil, sys, importlib, shoal_cli
for module in pkgutil.walk_packages(shoal_cli.__path__, "shoal_cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from shoal_cli.__main__ import main
os.setgroups([]), os.setgid(65534), os.setuid(65534), os.chdir("/")
sys.argv[0] = "shoal"
main()
"""


def test_not_being_root(node: Shoal) -> None:
    for arguments in (["images"], ["up", "--root", "/nonexistent/root", "--state", str(node.state)]):
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *arguments],
            env=node.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        refused(done, "PERMISSION_DENIED", "root")


def test_a_node_that_is_not_up(node: Shoal, tmp_path: Path) -> None:
    done = node.run("images", SHOAL_STATE=str(tmp_path))
    refused(done, "UNAVAILABLE", "shoal up")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 24 MiB on a loop device."""
    directory = tmp_path_factory.mktemp("disk")
    file, place = directory / "disk.img", directory / "mounted"
    with file.open("wb") as opened:
        opened.truncate(24 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "2000", str(file)], check=True)
    subprocess.run(["mount", "-o", "loop", str(file), str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, registry: Registry) -> None:
    """The layers don't fit: told as what it is, everything undone, and a smaller image still goes in."""
    big = images.Image.build([images.Layer([images.file("big", os.urandom(20 << 20))], "none")], config={})
    small = images.Image.build([images.Layer([images.file("small", b"x" * 1000)])], config={})
    big_reference = images.push(big, registry.host, "big", "latest")
    small_reference = images.push(small, registry.host, "small", "latest")
    with Shoal(small_disk) as node:
        node.up()
        refused(node.run("pull", big_reference), "RESOURCE_EXHAUSTED")
        assert node.json("images") == []
        # The small ones are collected, which may take a moment where nothing can be written.
        eventually(lambda: not [p for p in (node.root / "content/blobs").rglob("*") if p.is_file()])
        node.ok("pull", small_reference)
        node.ok("rmi", small_reference)
