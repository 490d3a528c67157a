"""Any sequence of archive members, over any layer below: it is applied or refused, and nothing outside is touched."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal_bus.archive.tar import TarReader
from shoal_runtime.shim.mounts import mount_all, unmount_all
from shoal_snapshot import disk
from shoal_snapshot.apply import directories
from shoal_snapshot.apply.directories import attach
from shoal_snapshot.apply.errors import ApplyError, NeedsParent
from shoal_snapshot.apply.extract import extract

from tests.support import images

PARTS = st.sampled_from(["a", "b", "c", "..", ".", "", ".wh.a", ".wh..wh..opq"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TARGETS = st.one_of(
    PATHS, st.sampled_from(["/", "/OUTSIDE", "../outside", "../../../../../OUTSIDE", "a/../../outside/f"])
)
ENTRIES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]), PATHS, st.just("")),
        st.tuples(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE]), PATHS, TARGETS),
    ),
    max_size=12,
)


def tar(entries: list[tuple[bytes, str, str]], outside: Path) -> bytes:
    made = []
    for kind, name, link in entries:
        target = link.replace("/OUTSIDE", str(outside))
        made.append(images.entry(name, kind, 0o755, b"new" if kind == tarfile.REGTYPE else b"", linkname=target))
    return images.Layer(made, "none").tar()


def resum(data: bytearray) -> None:
    """Corrects the headers' checksums, so that what is damaged is read."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


@contextmanager
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def state(place: Path) -> list[tuple[str, int, int, int, int, bytes]]:
    return [
        (str(p), s.st_mode, s.st_nlink, s.st_mtime_ns, s.st_uid, p.read_bytes() if p.is_file() else b"")
        for p in [place, *sorted(place.rglob("*"))]
        for s in [p.lstat()]
    ]


@settings(max_examples=250, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_nothing_outside_is_touched(layers: list[list[tuple[bytes, str, str]]]) -> None:
    with no_umask(), tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        outside = base / "outside"
        outside.mkdir()
        (outside / "f").write_bytes(b"kept")
        before = state(outside)
        below: list[str] = []
        for number, entries in enumerate(layers):
            root = base / f"layer-{number}"
            root.mkdir()
            with suppress(ApplyError):
                extract(TarReader(iter([tar(entries, outside)])), str(root), below)
            below.insert(0, str(root))
            assert state(outside) == before
            assert disk.usage(str(root))[1] >= 1
        assert sorted(p.name for p in base.iterdir()) == sorted(["outside", *(Path(b).name for b in below)])
        for path in below:
            disk.empty(path)
            assert list(Path(path).iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(ENTRIES, st.lists(st.tuples(st.integers(0, 8_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_archive_is_refused_in_words(
    entries: list[tuple[bytes, str, str]], damage: list[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        data = bytearray(tar(entries, Path(directory) / "outside"))
        for at, value in damage:
            data[at % len(data)] = value
        resum(data)
        root = Path(directory) / "root"
        root.mkdir()
        with suppress(ApplyError):
            extract(TarReader(iter([bytes(data)])), str(root))
        assert [p.name for p in Path(directory).iterdir()] == ["root"]


MODES = st.sampled_from([0o755, 0o700, 0o2751, 0o1777])
LAYERS = st.lists(
    st.tuples(
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]),
        st.lists(st.sampled_from(["a", "b", "c", "d", "..", ".wh.a", ".wh.b", ".wh..wh..opq"]), min_size=1, max_size=4)
        .map("/".join),
        st.sampled_from(["a", "b/c", "/a", "a/b", "../b", "d"]),
        MODES,
        st.integers(0, 3),
    ),
    max_size=10,
)  # fmt: skip


def layer(entries: list[tuple[bytes, str, str, int, int]], uid: int) -> bytes:
    made = []
    for number, (kind, name, link, mode, gid) in enumerate(entries):
        data = b"%d" % number if kind == tarfile.REGTYPE else b""
        made.append(images.entry(name, kind, mode, data, linkname=link, uid=uid, gid=gid, mtime=1_000 + number))
    return images.Layer(made, "none").tar()


def upper(root: Path) -> dict[str, tuple[object, ...]]:
    """What a layer holds, with overlayfs's marks, and with the times that an archive has told."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        if not os.path.lexists(path):
            continue  # a whiteout in a directory that is one layer's alone: an overlay lists it
        status = path.lstat()
        told = status.st_mtime if status.st_mtime < 1_000_000 else None
        marks = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        target = str(path.readlink()) if path.is_symlink() else ""
        about = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, told, content, target, marks)
        found[str(path.relative_to(root))] = about if path != root else about[:4]
    return found


def outcome(tar: bytes, root: Path, lowers: list[str], *, detached: bool) -> dict[str, tuple[object, ...]] | str:
    root.mkdir()
    try:
        if not detached:
            extract(TarReader(iter([tar])), str(root), lowers)
        else:
            attach(str(root), lowers, extract(TarReader(iter([tar])), str(root), detached=True).implied)
    except ApplyError as error:
        return error.code
    except NeedsParent:
        return "on its parent"
    return upper(root)


@settings(max_examples=250, deadline=None)
@given(LAYERS, LAYERS, LAYERS, st.booleans())
def test_a_layer_without_those_below_comes_out_the_same_or_asks_for_them(
    first: list[tuple[bytes, str, str, int, int]],
    second: list[tuple[bytes, str, str, int, int]],
    third: list[tuple[bytes, str, str, int, int]],
    forgetful: bool,
) -> None:
    """Also one of which only so much is remembered that attributes are given, and directories forgotten, in between."""
    with no_umask(), tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        base = Path(place)
        lowers: list[str] = []
        for number, entries in enumerate((first, second)):
            root = base / f"lower-{number}"
            if isinstance(outcome(layer(entries, number), root, lowers, detached=False), dict):
                lowers.insert(0, str(root))
        if not lowers:
            return
        tar = layer(third, 3)
        expected = outcome(tar, base / "serial", lowers, detached=False)
        if forgetful:
            patch.setattr(directories, "_MAX_KNOWN_BYTES", 300)
            patch.setattr(directories, "_MAX_PENDING_BYTES", 300)
            assert outcome(tar, base / "forgetful", lowers, detached=False) == expected
        found = outcome(tar, base / "detached", lowers, detached=True)
        assert found in (expected, "on its parent")


def shown(point: Path, layers: list[str]) -> dict[str, tuple[object, ...]]:
    """What the kernel makes of layers, the highest first; a directory's time isn't looked at."""
    (below := point / "below").mkdir(parents=True, exist_ok=True)
    (at := point / "at").mkdir(exist_ok=True)
    options = [f"lowerdir={':'.join([*layers, str(below)])}"]
    mount_all([{"type": "overlay", "source": "overlay", "options": options}], str(at))
    try:
        found = upper(at)
    finally:
        unmount_all(str(at))
    return {path: about[:4] if stat.S_ISDIR(about[0]) else about for path, about in found.items()}  # type: ignore[arg-type]


def without_links(
    entries: list[tuple[bytes, str, str, int, int]], *, whiteouts_first: bool
) -> list[tuple[bytes, str, str, int, int]]:
    """Entries but hard links, and their whiteouts before or after all others, from the root down."""
    plain = [
        (kind, "/".join(part for part in name.split("/") if part != "..") or "d", *rest)
        for kind, name, *rest in entries
        if kind != tarfile.LNKTYPE
    ]
    whiteouts = sorted((one for one in plain if ".wh." in one[1]), key=lambda one: str(one[1]).count("/"))
    others = [one for one in plain if ".wh." not in one[1]]
    return whiteouts + others if whiteouts_first else others + whiteouts  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(LAYERS, LAYERS, LAYERS, st.booleans(), st.booleans())
def test_a_layer_on_another_one_in_one_directory_shows_what_two_directories_would(
    base: list[tuple[bytes, str, str, int, int]],
    first: list[tuple[bytes, str, str, int, int]],
    second: list[tuple[bytes, str, str, int, int]],
    alone: bool,
    whiteouts_first: bool,
) -> None:
    """But for hard links, which stay some, and for a file where a directory is implied, which is refused."""
    with no_umask(), tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tars = [
            layer(without_links(entries, whiteouts_first=whiteouts_first), number)
            for number, entries in enumerate((base, first, second))
        ]
        lowers: list[str] = []
        if not alone and isinstance(outcome(tars[0], place / "lower", [], detached=False), dict):
            lowers = [str(place / "lower")]
        for name in ("one", "both"):
            if not isinstance(outcome(tars[1], place / name, lowers, detached=False), dict):
                return
        expected = outcome(tars[2], place / "two", [str(place / "one"), *lowers], detached=False)
        try:
            extract(TarReader(iter([tars[2]])), str(place / "both"), lowers, filled=True)
        except ApplyError as error:
            refused = error
        else:
            apart = [str(place / "two"), str(place / "one"), *lowers]
            assert shown(place / "seen", [str(place / "both"), *lowers]) == shown(place / "seen", apart)
            return
        if not isinstance(expected, str):
            assert "in the way of a directory" in refused.message


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
            st.binary(min_size=1, max_size=150).filter(lambda name: b"\0" not in name and b"/" not in name),
            st.integers(0, 20_000),
            MODES,
        ),
        max_size=12,
        unique_by=lambda one: one[1],
    )
)
def test_archives_come_out_as_gnu_tar_has_them(entries: list[tuple[bytes, bytes, int, int]]) -> None:
    """Whatever the names are, in PAX and in GNU's own form."""
    made: list[images.Entry] = []
    directory, file = "", tarfile.TarInfo()
    for kind, raw, number, mode in entries:
        if raw in (b".", b"..") or raw.startswith(b".wh.") or (kind == tarfile.LNKTYPE and not file.name):
            continue
        name = f"{directory}{os.fsdecode(raw)}"
        if kind == tarfile.LNKTYPE:  # what it says of the file is what the file has
            about = {key: getattr(file, key) for key in ("mtime", "uid", "gid")}
            made.append(images.entry(name, kind, file.mode, linkname=file.name, **about))
            continue
        data = bytes([number % 256]) * number if kind == tarfile.REGTYPE else b""
        link = "a target" if kind == tarfile.SYMTYPE else ""
        made.append(images.entry(name, kind, mode, data, linkname=link, mtime=number, uid=number, gid=number + 1))
        if kind == tarfile.DIRTYPE:
            directory = f"{name}/"
        if kind == tarfile.REGTYPE:
            file = made[-1][0]
    with no_umask(), tempfile.TemporaryDirectory() as place:
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
                for info, data in made:
                    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
            ours, theirs = Path(place) / f"ours-{form}", Path(place) / f"theirs-{form}"
            ours.mkdir()
            theirs.mkdir()
            extract(TarReader(iter([buffer.getvalue()])), str(ours))
            command = ["tar", "-xp", "--numeric-owner", "--same-owner", "--absolute-names", "-C", str(theirs)]
            subprocess.run(command, input=buffer.getvalue(), check=True, capture_output=True)
            assert upper(ours) == upper(theirs)
            links = ({path.name: path.lstat().st_nlink for path in one.rglob("*")} for one in (ours, theirs))
            assert next(links) == next(links)
