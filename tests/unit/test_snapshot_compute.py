"""Layers computed from two trees: what they say, byte for byte the same, and the trees they make again."""

from __future__ import annotations

import gzip
import io
import os
import random
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from shoal_bus.archive.tar import TarReader
from shoal_snapshot.apply.errors import ApplyError
from shoal_snapshot.apply.extract import extract
from shoal_snapshot.diff.compute import changed_directory, compute

from tests.support import images
from tests.support.snapshotter_suite import listing
from tests.support.trees import change, grow, overlaid

NOW = 1_600_000_000_123_456_789


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def bind(directory: Path) -> list[dict[str, Any]]:
    return [{"type": "bind", "source": str(directory), "options": ["ro", "rbind"]}]


def layer_of(
    directory: Path, lower: list[dict[str, Any]], upper: list[dict[str, Any]], **more: Any
) -> tuple[bytes, dict[str, Any]]:
    """The layer that makes `upper` of `lower`, and what is said of it."""
    file = directory / f"layer-{random.getrandbits(40):x}"
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    arguments = {"lower": lower, "upper": upper, "compression": "none", **more}
    try:
        told = compute(arguments, lambda _: None, output)
    finally:
        os.close(output)
    data = file.read_bytes()
    file.unlink()
    assert (told["size"], told["digest"]) == (len(data), images.digest_of(data))
    return data, told


def members(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.name + ("/" if member.isdir() else "") for member in archive]


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    place = tmp_path / "lower"
    place.mkdir()
    return place


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    place = tmp_path / "upper"
    place.mkdir()
    return place


def both(lower: Path, upper: Path, name: str, text: str = "same") -> None:
    for place in (lower, upper):
        (place / name).write_text(text)
        os.utime(place / name, ns=(NOW, NOW))


def settle(*places: Path) -> None:
    """All directories of the same age, so that they differ by nothing but what a test changed."""
    for place in places:
        for path in [place, *(p for p in place.rglob("*") if p.is_dir() and not p.is_symlink())]:
            os.utime(path, ns=(NOW, NOW))


def test_what_is_new_changed_or_gone_is_told_and_nothing_else(lower: Path, upper: Path, tmp_path: Path) -> None:
    for place in (lower, upper):
        for name in ("kept", "a", "a/b"):
            (place / name).mkdir()
    for name in ("kept/file", "a/same", "a/b/changed", "a/b/older"):
        both(lower, upper, name)
    (lower / "gone").mkdir()
    (lower / "gone/file").touch()
    (lower / "a/gone").touch()
    (upper / "a/b/changed").write_text("else")
    os.utime(upper / "a/b/older", ns=(NOW - 5, NOW - 5))
    (upper / "new").touch()
    settle(lower, upper)
    data, told = layer_of(tmp_path, bind(lower), bind(upper))
    assert members(data) == ["a/", "a/b/", "a/b/changed", "a/b/older", "a/.wh.gone", ".wh.gone", "new"]
    assert told["entries"] == 7


def test_nothing_changed_is_an_empty_layer(lower: Path, upper: Path, tmp_path: Path) -> None:
    for place in (lower, upper):
        (place / "d").mkdir()
    both(lower, upper, "d/f")
    settle(lower, upper)
    assert layer_of(tmp_path, bind(lower), bind(upper))[0] == bytes(1024)


def test_content_is_compared_where_somebody_set_the_time(lower: Path, upper: Path, tmp_path: Path) -> None:
    for place, text in ((lower, "one"), (upper, "two")):
        (place / "f").write_text(text)
        os.utime(place / "f", (5, 5))
    both(lower, upper, "g")
    for place in (lower, upper):
        os.utime(place / "g", (5, 5))
    assert members(layer_of(tmp_path, bind(lower), bind(upper))[0]) == ["f"]


def test_without_a_lower_tree_all_is_new(upper: Path, tmp_path: Path) -> None:
    (upper / "d").mkdir()
    (upper / "d/f").write_bytes(b"x" * 700)
    (upper / "l").symlink_to("d/f")
    os.mkfifo(upper / "p")
    os.mknod(upper / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    data, _ = layer_of(tmp_path, [], bind(upper))
    assert members(data) == ["d/", "d/f", "l", "null", "p"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert (archive.getmember("null").devmajor, archive.getmember("null").devminor) == (1, 3)
        assert archive.getmember("l").linkname == "d/f"
        assert archive.extractfile("d/f").read() == b"x" * 700  # type: ignore[union-attr]


def test_a_file_that_an_archive_would_misread_is_refused(upper: Path, tmp_path: Path) -> None:
    (upper / ".wh.f").touch()
    with pytest.raises(ApplyError, match=r"\.wh\.f: a layer can't hold") as error:
        layer_of(tmp_path, [], bind(upper))
    assert error.value.code == "FAILED_PRECONDITION"


def test_sockets_are_left_out_and_hide_what_was_there(lower: Path, upper: Path, tmp_path: Path) -> None:
    (lower / "s").touch()
    here = Path.cwd()
    os.chdir(upper)  # a socket's path is short
    try:
        for name in ("s", "t"):
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
    finally:
        os.chdir(here)
    assert members(layer_of(tmp_path, bind(lower), bind(upper))[0]) == [".wh.s"]


def test_all_names_of_a_file_are_told_when_one_is(lower: Path, upper: Path, tmp_path: Path) -> None:
    both(lower, upper, "b")
    os.link(upper / "b", upper / "a")
    os.link(upper / "b", upper / "c")
    data, _ = layer_of(tmp_path, bind(lower), bind(upper))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(m.name, m.islnk(), m.linkname) for m in archive] == [
            ("a", False, ""),
            ("b", True, "a"),
            ("c", True, "a"),
        ]
    os.link(upper / "b", upper / "0-first-unchanged")
    both(lower, lower, "0-first-unchanged")
    data, _ = layer_of(tmp_path, bind(lower), bind(upper))
    assert sorted(members(data)) == ["0-first-unchanged", "a", "b", "c"]


def test_attributes_are_told_as_they_are(upper: Path, tmp_path: Path) -> None:
    (upper / "f").write_bytes(b"#!")
    os.chown(upper / "f", 3_000_000_000, 70_000)
    (upper / "f").chmod(0o4751)
    os.setxattr(upper / "f", "user.note", b"\xff\0\n=")
    os.setxattr(upper / "f", "user.overlay.opaque", b"y")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(upper / "f", "security.capability", capability)
    os.utime(upper / "f", ns=(NOW, NOW))
    long = "n" * 120
    (upper / long).mkdir()
    (upper / long / ("m" * 200)).touch()
    (upper / "link").symlink_to("t" * 300)
    os.utime(upper / "link", ns=(-1_500_000_000, -1_500_000_000), follow_symlinks=False)
    data, _ = layer_of(tmp_path, [], bind(upper))
    entries = {entry.name.rstrip(b"/"): entry for entry in TarReader(iter([data]))}
    found = entries[b"f"]
    assert (found.uid, found.gid, found.mode, found.mtime) == (3_000_000_000, 70_000, 0o4751, NOW)
    assert found.xattrs == {"user.note": b"\xff\0\n=", "security.capability": capability}
    assert f"{long}/{'m' * 200}".encode() in entries
    assert entries[b"link"].link == b"t" * 300
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmember("link").mtime == -1.5


def test_holes_are_zeros_in_the_archive(upper: Path, tmp_path: Path) -> None:
    content = bytearray(5_000_000)
    with (upper / "f").open("wb") as file:
        for at, piece in ((0, b"begin"), (2_000_000, b"middle"), (4_000_000, b"x" * 10_000)):
            file.seek(at)
            file.write(piece)
            content[at : at + len(piece)] = piece
        file.truncate(5_000_000)
    (upper / "empty").open("wb").truncate(70_001)
    data, _ = layer_of(tmp_path, [], bind(upper))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.extractfile("f").read() == bytes(content)  # type: ignore[union-attr]
        assert archive.extractfile("empty").read() == bytes(70_001)  # type: ignore[union-attr]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_the_same_tree_is_the_same_layer(tmp_path: Path, compression: str) -> None:
    blobs = []
    for number in range(2):
        place = tmp_path / f"tree-{number}"
        place.mkdir()
        grow(place, random.Random(7))
        settle(place)
        blobs.append(layer_of(tmp_path, [], bind(place), compression=compression))
    assert blobs[0] == blobs[1]
    data, told = blobs[0]
    tar = {"none": lambda: data, "gzip": lambda: gzip.decompress(data),
           "zstd": lambda: zstandard.ZstdDecompressor().decompressobj().decompress(data)}[compression]()  # fmt: skip
    assert told["diff_id"] == images.digest_of(tar)
    if compression == "gzip":
        assert data[4:8] == bytes(4), "no time"
        assert not data[3], "no name"


def test_no_file_is_newer_than_asked(lower: Path, upper: Path, tmp_path: Path) -> None:
    (lower / "gone").touch()
    for name, time in (("new", 5000), ("old", 7)):
        (upper / name).touch()
        os.utime(upper / name, (time, time))
    data, _ = layer_of(tmp_path, bind(lower), bind(upper), source_date_epoch=100)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {m.name: m.mtime for m in archive} == {".wh.gone": 100, "new": 100, "old": 7}


@pytest.mark.parametrize("options", [("index=off",), ("metacopy=on", "redirect_dir=on")], ids=["plain", "metacopy"])
@pytest.mark.parametrize("seed", [*range(40), 41, 70])
def test_a_layer_applied_to_the_lower_tree_makes_the_upper_one(
    tmp_path: Path, seed: int, options: tuple[str, ...]
) -> None:
    """Also by overlayfs's own directory, which must make the very same layer; and unpacked in place, and as a layer."""
    chance = random.Random(seed)
    with overlaid(tmp_path, chance, 1 + seed % 3, options) as tree:
        with tree.mounted() as root:
            change(root, chance)
        upper, lower = tree.view(), tree.lower()
        assert changed_directory(lower, upper)
        fast, told = layer_of(tmp_path, lower, upper)
        slow, _ = layer_of(tmp_path, lower, upper, hints=False)
        assert members(fast) == members(slow)
        assert fast == slow
        assert told["entries"] == len(members(fast))
        with tree.mounted() as root:
            expected = listing(root)
        # Unpacked as a layer of its own, over the same lower ones.
        with tree.sibling() as (place, mounted):
            extract(TarReader(iter([fast])), str(place), [str(lower) for lower in tree.lowers])
            with mounted() as root:
                assert listing(root) == expected
        # Carried out on a copy of all that lies below.
        with tree.copied() as place:
            extract(TarReader(iter([fast])), str(place), filled=True)
            assert listing(place) == expected
        # And by GNU tar, which knows no whiteouts, and merges attributes of directories that are there.
        with tree.copied() as place:
            for name in members(fast):
                directory, _, last = name.rstrip("/").rpartition("/")
                target = place / directory / last.removeprefix(".wh.")
                if name.endswith("/") and target.is_dir() and not target.is_symlink():
                    for key in os.listxattr(target):
                        os.removexattr(target, key)
                else:
                    subprocess.run(["rm", "-rf", str(target)], check=True)
            tar = ["tar", "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*"]
            subprocess.run([*tar, "-C", str(place)], input=fast, check=True)
            assert without_setgid(listing(place)) == without_setgid(expected)


def without_setgid(tree: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """A listing without what GNU tar leaves to directories that inherited it."""

    def stripped(what: tuple[Any, ...]) -> tuple[Any, ...]:
        mode = what[0] if what else None
        return (mode & ~stat.S_ISGID, *what[1:]) if isinstance(mode, int) and stat.S_ISDIR(mode) else what

    return {path: stripped(what) for path, what in tree.items()}
