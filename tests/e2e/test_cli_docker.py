"""Images between shoal and dockerd, by what `docker save` and `shoal save` write: the same image on both sides."""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.shoal import Shoal, refused, unique
from tests.support import images
from tests.support.dockerd import Dockerd
from tests.support.images import Layer, directory, file, symlink, whiteout
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    directory = tmp_path_factory.mktemp("d")
    outside = [Path("/var/lib/docker"), Path("/run/docker"), Path("/run/docker.sock"), Path("/etc/docker/key.json")]
    before = [place.exists() for place in outside]
    with Dockerd(directory) as started:
        yield started
    assert [place.exists() for place in outside] == before
    assert str(directory) not in Path("/proc/self/mounts").read_text()
    commands = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]  # none of one that has just ended
    assert [words for words in commands if any(str(directory) in word for word in words)] == []
    shutil.rmtree(directory)


def inspected(docker: Dockerd, image: str) -> dict[str, Any]:
    [found] = json.loads(docker("image", "inspect", image))
    return dict(found)


def read(docker: Dockerd, image: str, path: str) -> bytes:
    """A file of an image, as docker has it; nothing is run for that."""
    container = docker("create", image, "none").strip()
    try:
        done = docker._run("cp", f"{container}:{path}", "-")
        assert done.returncode == 0, done.stderr
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            [member] = archive.getmembers()
            opened = archive.extractfile(member)
            assert opened is not None
            return opened.read()
    finally:
        docker("rm", container)


@pytest.fixture(scope="module")
def made(docker: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two images that dockerd has made, the second one on top of the first."""
    one, two = f"team/{unique('app')}:one", f"team/{unique('app')}:two"
    rootfs = images.busybox_layer(compression="none").tar()
    docker("import", "--change", 'CMD ["cat", "/etc/made-by"]', "--change", "ENV FROM=docker", "-", one, stdin=rootfs)
    container = docker("create", one).strip()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info, data = file("made-by", b"dockerd\n")
        archive.addfile(info, io.BytesIO(data))
    docker("cp", "-", f"{container}:/etc", stdin=buffer.getvalue())
    docker("commit", container, two)
    docker("rm", container)
    return [one, two]


def test_what_docker_saves_is_loaded_and_runs(node: Shoal, docker: Dockerd, made: list[str], tmp_path: Path) -> None:
    archive = tmp_path / "saved.tar"
    docker("save", "-o", str(archive), *made)
    with tarfile.open(archive) as saved:
        assert {"manifest.json", "repositories"} <= set(saved.getnames())
    loaded = {image["name"]: image for image in node.json("load", "-i", str(archive))}
    assert set(loaded) == {f"docker.io/{name}" for name in made}
    one, two = made
    assert node.ok("run", "--rm", two, "cat", "/etc/made-by") == "dockerd\n"
    assert node.ok("run", "--rm", one, "sh", "-c", "echo $FROM; ls /etc/made-by 2>&1 || true").startswith("docker\n")
    for name in made:
        found, there = inspected(docker, name), node.json("image", "inspect", name)
        assert there["resolved"]["config_descriptor"]["digest"] == found["Id"], "docker's image ID"
        assert there["resolved"]["diff_ids"] == found["RootFS"]["Layers"]
    node.ok("rmi", *made)


def test_what_docker_saves_is_loaded_from_a_pipe_and_compressed(
    node: Shoal, docker: Dockerd, made: list[str], tmp_path: Path
) -> None:
    archive = tmp_path / "saved.tar"
    docker("save", "-o", str(archive), made[1])
    by_xz = node.run("load", stdin=lzma.compress(archive.read_bytes(), preset=0))
    refused(by_xz, 7, "FAILED_PRECONDITION", "xz -dc")
    subprocess.run(["gzip", "-1", str(archive)], check=True)
    printed = node.ok("load", stdin=(tmp_path / "saved.tar.gz").read_bytes())
    assert printed.startswith(f"docker.io/{made[1]} sha256:")
    assert node.ok("run", "--rm", made[1]) == "dockerd\n", "the command that it was imported with"
    node.ok("rmi", made[1])


@pytest.mark.parametrize("flavour", ["oci", "docker"])
def test_what_shoal_saves_is_loaded_by_docker(
    node: Shoal, docker: Dockerd, registry: Registry, tmp_path: Path, flavour: images.Flavour
) -> None:
    image = images.Image.build(
        [
            Layer([directory("etc"), file("etc/motd", b"lower"), file("etc/gone"), symlink("link", "etc")], "gzip"),
            Layer([file("etc/motd", b"upper"), whiteout("etc/gone"), file("big", os.urandom(70_000))], "none"),
        ],
        config={"Cmd": ["x"], "Env": ["A=b"], "Labels": {"made": unique("label")}}, flavour=flavour,
    )  # fmt: skip
    name = images.push(image, registry.host, f"saved-{flavour}")
    node.ok("pull", name)
    archive = tmp_path / "saved.tar"
    node.ok("save", "-o", str(archive), name)
    assert f"Loaded image: {name}" in docker("load", "-i", str(archive))
    found = inspected(docker, name)
    assert found["RootFS"]["Layers"] == image.diff_ids
    assert (found["Config"]["Cmd"], found["Config"]["Env"]) == (["x"], ["A=b"])
    assert found["Config"]["Labels"] == image.config["config"]["Labels"]
    assert found["Id"] == node.json("image", "inspect", name)["resolved"]["config_descriptor"]["digest"]
    assert read(docker, name, "/etc/motd") == b"upper"
    docker("rmi", name)
    node.ok("rmi", name)


def test_an_image_goes_to_docker_and_back_and_stays_the_same(
    node: Shoal, docker: Dockerd, made: list[str], tmp_path: Path
) -> None:
    there, back = tmp_path / "there.tar", tmp_path / "back.tar"
    docker("save", "-o", str(there), made[1])
    [loaded] = node.json("load", "-i", str(there))
    node.ok("save", "-o", str(back), made[1])
    before = inspected(docker, made[1])
    docker("rmi", "--force", made[1])
    docker("load", "-i", str(back))
    assert inspected(docker, made[1])["Id"] == before["Id"]
    docker("save", "-o", str(there), made[1])
    [again] = node.json("load", "-i", str(there))
    assert again["target"]["digest"] == loaded["target"]["digest"]
    node.ok("rmi", made[1])
