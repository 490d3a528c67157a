"""`shoal push`, `pull --user` and `referrers`, as people use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.shoal import Shoal, refused
from tests.support import images
from tests.support.images import Image, Layer, file
from tests.support.registry import Registry, running

SECRET = "s3cr3t-pa55"
SECRET_BCRYPT = "$2b$04$eqZkAqAwF8FPtc1AEyw2reJcSe5K/N431Xb/WSveuwQtSO1gPRi4m"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory: Path = tmp_path_factory.mktemp("private")
    users = directory / "htpasswd"
    users.write_text(f"user:{SECRET_BCRYPT}\n")
    with running(directory / "registry", htpasswd=users) as started:
        yield started


def test_pushed_image_is_what_was_pulled(node: Shoal, registry: Registry, image: str) -> None:
    to = f"{registry.host}/pushed/app:v1"
    done = node.run("push", image, to)
    assert done.returncode == 0, done.stderr
    name, digest = done.stdout.split()
    assert name == to
    assert f"{to}: done" in done.stderr
    assert node.json("images")
    assert node.json("push", image, to, "--quiet")["target"]["digest"] == digest
    node.ok("-h")
    assert digest in node.ok("pull", "--quiet", to)


def test_pushing_under_its_own_name_needs_no_destination(node: Shoal, image: str) -> None:
    assert node.ok("push", "--quiet", image).startswith(f"{image} sha256:")


def test_user_is_asked_for_a_password_and_let_in(node: Shoal, private: Registry, image: str) -> None:
    to = f"{private.host}/app:v1"
    refused(node.run("push", "--quiet", image, to), 6, "UNAUTHENTICATED", private.host, "--user")
    refused(node.run("push", "-q", image, to, "--user", "user", stdin=b""), 2, "INVALID_ARGUMENT", "standard input")
    refused(node.run("push", "-q", image, to, "--user", ":x"), 2, "INVALID_ARGUMENT", "--user")
    refused(node.run("push", "-q", image, to, "--user", "user:wrong"), 6, "UNAUTHENTICATED")
    node.ok("push", "--quiet", image, to, "--user", "user", stdin=f"{SECRET}\n".encode())
    refused(node.run("pull", "--quiet", to), 6, "UNAUTHENTICATED", private.host)
    assert to in node.ok("pull", "--quiet", to, "--user", f"user:{SECRET}")
    assert SECRET not in node.log.read_text()


def test_what_cant_be_pushed_is_one_line(node: Shoal, registry: Registry, image: str) -> None:
    refused(node.run("push", "-q", "nothing/here", f"{registry.host}/x"), 4, "NOT_FOUND", "nothing/here")
    both = node.run("push", "-q", image, "--platform", "linux/arm64", "--all-platforms")
    refused(both, 2, "INVALID_ARGUMENT", "--all-platforms")
    refused(node.run("push", "-q", image, "127.0.0.1:1/x"), 3, "UNAVAILABLE", "127.0.0.1:1")


def test_referrers_are_listed(node: Shoal, registry: Registry) -> None:
    made = Image.build([Layer([file("f")])])
    name = images.push(made, registry.host, "referred", "v1")
    assert node.json("referrers", name) == []
    sbom = Image.build([Layer([file("sbom")])])
    document = json.loads(sbom.manifest)
    document["subject"] = {"mediaType": made.media_type, "digest": made.digest, "size": len(made.manifest)}
    document["artifactType"] = "application/vnd.example.sbom"
    signed = Image(sbom.media_type, json.dumps(document).encode(), sbom.blobs)
    where = images.push(signed, registry.host, "referred", "sbom")
    node.ok("pull", "--quiet", where)
    node.ok("push", "--quiet", where)  # by shoal, which keeps the subject's tag where the registry has no API for it
    [found] = node.json("referrers", name)
    assert found["descriptor"]["digest"] == signed.digest
    assert "application/vnd.example.sbom" in node.ok("referrers", name, "--type", "application/vnd.example.sbom")
    assert node.json("referrers", name, "--type", "other") == []


def test_node_reads_hosts_toml_from_where_it_is_told(registry: Registry, busybox: str, tmp_path: Path) -> None:
    place = tmp_path / "certs.d" / "registry.invalid"
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text(f'server = "http://{registry.host}"\n')
    with Shoal(tmp_path / "node", node="mirrored") as node:
        node.directory.mkdir()
        node.up("--registry-config", str(tmp_path / "certs.d"))
        assert "registry.invalid/busybox:latest sha256:" in node.ok("pull", "--quiet", "registry.invalid/busybox")
