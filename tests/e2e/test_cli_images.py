"""Images by the command line: loaded, saved, named, converted, looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.e2e.shoal import COMMAND, Shoal, eventually, refused, unique
from tests.support.archives import layout, tar
from tests.support.images import Image, Layer, busybox_image, digest_of, directory, file


@pytest.fixture
def name(node: Shoal) -> str:
    """An image's name of the test's own."""
    return f"registry.example/{unique('app')}:v1"


@pytest.fixture
def archive(tmp_path: Path, name: str) -> Path:
    """An image of busybox under that name, as an archive."""
    path = tmp_path / "archive.tar"
    path.write_bytes(tar(layout({name: busybox_image(["echo", "from an archive"])})))
    return path


def places(node: Shoal) -> list[Path]:
    """What is left of the ways that archives took."""
    directory = node.state / "archives"
    return list(directory.iterdir()) if directory.exists() else []


@pytest.mark.usefixtures("in_either_process")
def test_loaded_image_runs_and_is_saved_as_it_was(node: Shoal, archive: Path, name: str, tmp_path: Path) -> None:
    loaded = node.ok("load", "-i", str(archive))
    digest = busybox_image(["echo", "from an archive"]).digest
    assert loaded == f"{name} {digest}\n"
    assert node.ok("run", "--rm", name) == "from an archive\n"
    out = tmp_path / "saved.tar"
    assert node.ok("save", name, "-o", str(out)) == ""
    piped = subprocess.run(
        [*COMMAND, "save", name], env=node.environment, capture_output=True, timeout=60, check=True
    ).stdout
    assert piped == out.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert [path.name for path in tmp_path.iterdir()].count("saved.tar") == 1
    assert not list(tmp_path.glob(".*"))
    node.ok("rmi", name)
    assert node.ok("load", stdin=piped) == f"{name} {digest}\n"
    assert places(node) == []
    node.ok("rmi", name)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_archives_that_cant_be_read_or_written_are_told(node: Shoal, archive: Path, name: str, tmp_path: Path) -> None:
    refused(node.run("load", "-i", str(tmp_path / "missing")), 2, "INVALID_ARGUMENT", "No such file")
    refused(node.run("load", "-i", str(tmp_path)), 2, "INVALID_ARGUMENT", "directory")
    refused(node.run("load", stdin=b""), 10, "DATA_LOSS", "empty")
    refused(node.run("load", stdin=b"hello" * 5000), 10, "DATA_LOSS", "not a tar archive")
    refused(node.run("load", stdin=archive.read_bytes()[:5000]), 10, "DATA_LOSS", "truncated")
    refused(node.run("save", name, "-o", str(tmp_path / "x.tar")), 4, "NOT_FOUND", name)
    refused(node.run("save", name), 4, "NOT_FOUND", name)
    refused(node.run("save", name, "-o", str(tmp_path / "no" / "x.tar")), 2, "INVALID_ARGUMENT", "No such file")
    assert {path.name for path in tmp_path.iterdir()} == {"archive.tar"}
    assert places(node) == []


def test_what_was_there_stays_when_a_save_fails(node: Shoal, name: str, tmp_path: Path) -> None:
    out = tmp_path / "x.tar"
    out.write_bytes(b"from before")
    refused(node.run("save", name, "-o", str(out)), 4, "NOT_FOUND")
    assert out.read_bytes() == b"from before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.usefixtures("in_either_process")
def test_interrupted_load_leaves_nothing(node: Shoal) -> None:
    loading = node.spawn("load", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert loading.stdin is not None
    staging = node.root / "content" / "staging"
    loading.stdin.write(bytes(tar(layout({"registry.example/x:1": busybox_image()})))[:300_000])
    loading.stdin.flush()
    eventually(lambda: list(staging.glob("*/*")))
    loading.send_signal(signal.SIGINT)
    assert loading.wait(20) == 130
    loading.stdin.close()
    eventually(lambda: not list(staging.iterdir()))
    assert places(node) == []


def test_killed_commands_leave_no_place_among_the_archives(node: Shoal, archive: Path, name: str) -> None:
    loading = node.spawn("load", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert loading.stdin is not None
    loading.stdin.write(archive.read_bytes()[:300_000])
    loading.stdin.flush()
    eventually(lambda: list((node.root / "content" / "staging").glob("*/*")))
    loading.kill()
    loading.wait(10)
    loading.stdin.close()
    node.ok("load", "-i", str(archive))
    assert places(node) == []
    eventually(lambda: not list((node.root / "content" / "staging").iterdir()))
    node.ok("rmi", name)


@pytest.mark.usefixtures("in_either_process")
def test_who_reads_a_saved_archive_may_stop(node: Shoal, archive: Path, name: str) -> None:
    node.ok("load", "-i", str(archive), "--no-unpack")
    script = " ".join(COMMAND) + f" save {name} | head -c 100 | wc -c"
    done = subprocess.run(
        ["sh", "-c", script], env=node.environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "100"
    assert places(node) == []
    node.ok("rmi", name)


def test_tags_filters_and_removal(node: Shoal, archive: Path, name: str) -> None:
    node.ok("load", "-i", str(archive))
    other = name.replace(":v1", ":v2")
    assert node.ok("tag", name, other) == f"{other}\n"
    listed = node.ok("images", "--quiet", "--filter", f"name=={other}")
    assert listed == f"{other}\n"
    digest = busybox_image(["echo", "from an archive"]).digest
    assert digest in node.ok("images", "--digests")
    node.ok("rmi", name)
    assert node.ok("run", "--rm", other) == "from an archive\n"
    refused_by = node.run("rmi", name, other)
    assert refused_by.returncode == 4
    assert refused_by.stdout == f"{other}\n"
    node.ok("rmi", "--force", name, other)


def test_image_is_looked_at(node: Shoal, tmp_path: Path) -> None:
    name = f"registry.example/{unique('app')}:v1"
    layers = [Layer([directory("etc")]), Layer([file("etc/more", b"more" * 1000)])]
    one = Image.build(layers, config={"Cmd": ["x"]})
    config = dict(one.config) | {
        "history": [
            {"created": "2020-01-01T00:00:00Z", "created_by": "ADD \x1b[31mfile"},
            {"created_by": "ENV a=b", "empty_layer": True},
            {"created_by": "COPY more", "comment": "kit"},
        ]
    }
    data = json.dumps(config).encode()
    manifest = json.loads(one.manifest)
    manifest["config"] |= {"digest": digest_of(data), "size": len(data)}
    told = Image(one.media_type, json.dumps(manifest).encode(), one.blobs | {digest_of(data): ("", data)})
    (tmp_path / "a.tar").write_bytes(tar(layout({name: told})))
    node.ok("load", "-i", str(tmp_path / "a.tar"))
    steps = node.json("image", "history", name)
    assert [step["created_by"] for step in steps] == ["COPY more", "ENV a=b", "ADD  [31mfile"]
    assert [step["digest"] for step in steps] == [one.layers[1], "", one.layers[0]]
    shown = node.ok("image", "history", name)
    assert "\x1b" not in shown
    assert "kit" in shown
    assert "complete" in node.ok("image", "check", name)
    assert "overlayfs" in node.ok("image", "platforms", name)
    inspected = node.json("image", "inspect", name)
    assert inspected["target"]["digest"] == told.digest
    assert inspected["resolved"]["config"]["config"]["Cmd"] == ["x"]
    usage = node.json("image", "usage", name)
    assert usage["images"][0]["name"] == name
    assert usage["images"][0]["snapshots"][0]["snapshots"] == 2
    assert "together" in node.ok("image", "usage")
    made = name.replace(":v1", ":zstd")
    assert node.ok("convert", name, made, "--zstd").startswith(f"{made} sha256:")
    refused(node.run("convert", name, made, "--zstd", "--gzip"), 2, "INVALID_ARGUMENT", "one of them")
    node.ok("rmi", name, made)


def test_image_that_isnt_whole_is_told_by_the_exit_code(node: Shoal, tmp_path: Path) -> None:
    name = f"registry.example/{unique('app')}:v1"
    index = Image.index([Image.build([Layer([file("a")])], architecture=one) for one in ("arm64", "s390x")])
    (tmp_path / "a.tar").write_bytes(tar(layout({name: index})))
    node.ok("load", "-i", str(tmp_path / "a.tar"), "--platform", "linux/arm64", "--no-unpack")
    checked = node.run("image", "check", name)
    assert checked.returncode == 7
    assert "linux/arm64" in checked.stdout
    assert "absent" in checked.stdout
    node.ok("image", "unpack", name, "--platform", "linux/arm64")
    assert "overlayfs" in node.ok("image", "platforms", name)
    node.ok("rmi", name)


def test_docker_and_containerd_read_what_is_saved(node: Shoal, archive: Path, name: str, tmp_path: Path) -> None:
    """As far as that can be told without their daemons: names, links and sizes are what they look for."""
    node.ok("load", "-i", str(archive))
    out = tmp_path / "saved.tar"
    node.ok("save", name, "-o", str(out))
    with tarfile.open(out) as saved:
        read = {member.name: member for member in saved.getmembers()}
        docker = json.load(saved.extractfile("manifest.json"))  # type: ignore[arg-type]
        index = json.load(saved.extractfile("index.json"))  # type: ignore[arg-type]
    assert docker[0]["RepoTags"] == [name]
    assert {docker[0]["Config"], *docker[0]["Layers"]} <= read.keys()
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == name
    assert index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == "v1"
    node.ok("rmi", name)
