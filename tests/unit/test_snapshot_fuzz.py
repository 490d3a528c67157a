"""Any sequence of archive members, over any layer below: it is applied or refused, and nothing outside is touched."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from shoal_snapshot import disk
from shoal_snapshot.apply.errors import ApplyError
from shoal_snapshot.apply.extract import extract
from shoal_snapshot.apply.tar import TarReader

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
