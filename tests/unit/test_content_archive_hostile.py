"""Archives that somebody made to do harm, or that broke on their way: each refused with what is wrong with it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError
from shoal_content.archives import archive as archives
from shoal_content.archives.archive import Archive
from shoal_content.archives.work import load as loading
from shoal_content.archives.work import tar as tars
from shoal_content.archives.work.errors import Corrupt, Unacceptable, WorkError
from shoal_content.archives.work.load import Load, load
from shoal_content.archives.work.tar import TarReader, header, padding
from shoal_content.images import source
from shoal_content.images.selection import Selection, select

from tests.support.archives import blob, docker, layout, tar
from tests.support.images import Entry, Image, Layer, digest_of, directory, entry, file, hardlink, symlink

ONE = Image.build([Layer([file("a", b"a" * 3000)], "none")])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "apart").mkdir()
    return tmp_path


def apart(place: Path, data: bytes) -> Archive:
    """What the worker and the service make of an archive."""
    (place / "archive").write_bytes(data)
    load(Load(str(place / "archive"), str(place / "apart")), lambda *_: None)
    return Archive(place / "apart")


def chosen(place: Path, entries: Sequence[Entry]) -> list[Selection]:
    archive = apart(place, tar(entries))
    return [select(archive, "it", one.target, platform="", all_platforms=True) for one in archive.images()]


def refused(place: Path, entries: Sequence[Entry] | bytes, kind: type[WorkError], words: str) -> None:
    """It is refused while it is taken apart, and nothing is written but numbered files."""
    with pytest.raises(kind, match=words):
        apart(place, entries if isinstance(entries, bytes) else tar(entries))
    assert all(path.name.isdecimal() for path in (place / "apart").iterdir())
    assert {path.name for path in place.iterdir()} == {"apart", "archive"}


@pytest.mark.parametrize("name", ["../evil", "blobs/../../evil", "/etc/evil", "blobs/sha256/..", "a/" * 400])
def test_names_that_lead_out_are_refused(place: Path, name: str) -> None:
    refused(place, [*layout({"v1": ONE}), file(name, b"x")], Unacceptable, "its name")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"Z"])
def test_devices_and_other_things_are_refused(place: Path, kind: bytes) -> None:
    refused(
        place, [*layout({"v1": ONE}), entry("null", kind, 0o666)], Unacceptable, "neither a file|sparse|unknown type"
    )


@pytest.mark.parametrize("link", ["/etc/shadow", "../../../etc/shadow", "../../.."])
def test_links_out_of_the_archive_are_refused(place: Path, link: str) -> None:
    digest = ONE.layers[0]
    entries = layout({"v1": ONE}, leave_out=[digest])
    refused(place, [*entries, symlink(f"blobs/{digest.replace(':', '/')}", link)], Unacceptable, "link out")
    for path in (place / "apart").iterdir():
        path.unlink()
    refused(place, [*entries, hardlink("x", "../etc/shadow")], Unacceptable, "leads out")


def test_a_blob_that_is_a_link_to_another_one_isnt_that_one(place: Path) -> None:
    digest = ONE.layers[0]
    entries = layout({"v1": ONE}, leave_out=[digest])
    other = blob(b"other", digest_of(b"other"))
    link = symlink(f"blobs/{digest.replace(':', '/')}", digest_of(b"other").removeprefix("sha256:"))
    with pytest.raises(NotFound, match=digest):
        chosen(place, [*entries, other, link])


def test_links_in_a_circle_are_refused(place: Path) -> None:
    with pytest.raises(FailedPrecondition, match="too many links"):
        chosen(place, [symlink("manifest.json", "other"), symlink("other", "manifest.json")])


def test_content_that_isnt_what_its_name_says_is_refused(place: Path) -> None:
    digest = ONE.layers[0]
    entries = layout({"v1": ONE}, leave_out=[digest])
    refused(place, [*entries, blob(b"something else", digest)], Corrupt, "its content is")


@pytest.mark.parametrize("name", ["blobs/sha256/abc", "blobs/sha512/" + "a" * 64, "blobs/sha256/" + "A" * 64])
def test_a_blob_named_for_no_digest_is_refused(place: Path, name: str) -> None:
    refused(place, [file(name, b"x")], Unacceptable, "named for no digest")


@pytest.mark.parametrize("size", [0, 1, 1 << 40])
def test_a_descriptor_that_lies_about_a_size_is_refused(place: Path, size: int) -> None:
    manifest = json.loads(ONE.manifest)
    manifest["layers"][0]["size"] = size
    lying = Image(ONE.media_type, json.dumps(manifest).encode(), ONE.blobs)
    with pytest.raises(FailedPrecondition, match=f"its descriptor says {size}"):
        chosen(place, layout({"v1": lying}))


def test_a_header_that_lies_about_a_size_is_truncation(place: Path) -> None:
    refused(place, header("blob", 1 << 40) + b"x" * 512, Corrupt, "truncated")


@pytest.mark.parametrize("name", ["index.json", "manifest.json", "repositories", "oci-layout"])
def test_huge_documents_are_refused_before_they_are_written(place: Path, name: str) -> None:
    size = loading.MAX_DOCUMENT_BYTES + 1
    refused(place, header(name, size) + bytes(size) + padding(size), Unacceptable, "more than")
    assert list((place / "apart").iterdir()) == []


def test_huge_manifests_and_configurations_are_refused(place: Path) -> None:
    big = json.dumps({"x": "y" * loading.MAX_DOCUMENT_BYTES}).encode()
    manifest = json.loads(ONE.manifest)
    manifest["config"] |= {"digest": digest_of(big), "size": len(big)}
    image = Image(ONE.media_type, json.dumps(manifest).encode(), ONE.blobs | {digest_of(big): ("", big)})
    with pytest.raises(FailedPrecondition):
        chosen(place, layout({"v1": image}))


def test_documents_are_bounded_all_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_DOCUMENTS_BYTES", 20_000)
    monkeypatch.setattr(source, "MAX_DOCUMENTS_BYTES", 20_000)
    config = json.dumps({"rootfs": {"diff_ids": []}, "x": "y" * 3000}).encode()
    manifests = [{"Config": "c.json", "RepoTags": [f"app:{n}"], "Layers": []} for n in range(10)]
    with pytest.raises(FailedPrecondition, match="on top of"):
        chosen(place, [file("c.json", config), file("manifest.json", json.dumps(manifests).encode())])
    for path in (place / "apart").iterdir():
        path.unlink()
    images = [Image.build([], config={"Cmd": ["x" * 3000]}, architecture=f"a{n}") for n in range(10)]
    with pytest.raises(FailedPrecondition, match="too large"):
        chosen(place, layout({"v1": Image.index(images)}))


def test_the_same_member_twice_is_refused_unless_it_is_the_same(place: Path) -> None:
    entries = layout({"v1": ONE})
    assert len(chosen(place, [*entries, *entries])) == 1
    for path in (place / "apart").iterdir():
        path.unlink()
    refused(place, [*entries, file("index.json", b"{}")], Unacceptable, "twice")


def test_a_directory_in_a_members_place_is_refused(place: Path) -> None:
    refused(place, [*layout({"v1": ONE}), directory("index.json")], Unacceptable, "twice")


def test_too_many_members_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_ENTRIES", 100)
    refused(place, [file(str(n)) for n in range(101)], Unacceptable, "more than 100 members")


def test_extended_headers_are_bounded_all_together(place: Path) -> None:
    long = file("x", pax_headers={"comment": "y" * 40_000})
    one = tar([long])
    pax = one[: one.index(b"ustar", 1024) // 512 * 512]
    assert apart(place, one)
    for path in (place / "apart").iterdir():
        path.unlink()
    refused(place, pax + pax + one, Corrupt, "extended headers")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_decompression_bomb_is_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(loading, "_FREE_OF_SUSPICION", 4 << 20)
    size = 64 << 20
    bomb = compress(header("zeros", size) + bytes(size) + tars.END)
    assert len(bomb) < 100_000
    with pytest.raises(WorkError, match="grows more than") as raised:
        apart(place, bomb)
    assert raised.value.code == "RESOURCE_EXHAUSTED"
    assert sum(path.stat().st_size for path in (place / "apart").iterdir()) < size


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_truncation_anywhere_is_told(place: Path, compression: str) -> None:
    whole = Layer.compress(tar(layout({"v1": ONE})), compression)
    assert len(chosen_of(place, whole)) == 1
    step = max(1, len(whole) // 150)
    for end in [*range(0, 40), *range(40, len(whole) - 1, step)]:
        for path in (place / "apart").iterdir():
            path.unlink()
        try:
            found = chosen_of(place, whole[:end])
        except (WorkError, ShoalError) as error:
            code = error.code if isinstance(error.code, str) else error.code.name
            assert code in ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION")
        else:
            # All that was cut off are the zeros behind the last member.
            assert found[0].target.digest == ONE.digest
            assert end > len(whole) - 10240


def chosen_of(place: Path, data: bytes) -> list[Selection]:
    archive = apart(place, data)
    return [select(archive, "it", one.target, platform="", all_platforms=True) for one in archive.images()]


def test_what_is_no_archive_is_told(place: Path) -> None:
    for data, kind in ((b"", Corrupt), (b"hello" * 1000, Corrupt), (bytes(10_240), None)):
        (place / "archive").write_bytes(data)
        if kind is None:
            with pytest.raises(FailedPrecondition, match="no images"):
                chosen_of(place, data)
        else:
            with pytest.raises(kind):
                apart(place, data)


def test_an_endless_trailer_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_MAX_TRAILER", 2 << 20)
    refused(place, tar(layout({"v1": ONE})) + bytes(8 << 20), Unacceptable, "after its end")


def test_a_docker_archive_whose_layer_isnt_its_configurations_is_refused(place: Path) -> None:
    entries = docker({"app:v1": ONE})
    wrong = [
        (info, tar([file("b", b"b")])) if info.name.endswith("layer.tar") else (info, data) for info, data in entries
    ]
    for info, data in wrong:
        info.size = len(data)
    with pytest.raises(FailedPrecondition, match="isn't the one that its configuration says"):
        chosen(place, wrong)


@pytest.mark.parametrize(
    "document",
    [
        [{}],
        [{"Config": "../../etc/passwd", "Layers": []}],
        [{"Config": "x.json", "Layers": ["/etc/passwd"]}],
        [{"Config": 5}],
        [{"Config": "missing", "Layers": [], "RepoTags": ["a"]}],
        [{"Config": "x.json", "Layers": {"a": 1}}],
        ["x"],
        {"a": 1},
    ],
)
def test_docker_documents_that_name_what_isnt_there_are_refused(place: Path, document: Any) -> None:
    with pytest.raises(FailedPrecondition):
        chosen(place, [file("x.json", b"{}"), file("manifest.json", json.dumps(document).encode())])


def test_old_images_that_are_their_own_parents_are_refused(place: Path) -> None:
    told = {"id": "a", "parent": "a", "os": "linux", "architecture": "amd64"}
    entries = [
        file("a/json", json.dumps(told).encode()),
        file("a/layer.tar", tar([])),
        file("repositories", b'{"x": {"y": "a"}}'),
    ]
    with pytest.raises(FailedPrecondition, match="goes in a circle"):
        chosen(place, entries)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2048), st.integers(0, 6000))
def test_damage_anywhere_is_told_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    place = tmp_path_factory.mktemp("damage")
    (place / "apart").mkdir()
    whole = tar(layout({"v1": ONE}))
    damaged = whole[:at] + noise + whole[at + len(noise) :]
    try:
        chosen_of(place, damaged)
    except (WorkError, ShoalError):
        return


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abcxyz/._-", min_size=1, max_size=300), st.binary(max_size=2000)), max_size=5))
def test_what_tarfile_writes_is_read_as_it_reads_it(entries: list[tuple[str, bytes]]) -> None:
    named = {name.strip("/") or "x": data for name, data in entries if ".." not in name.split("/")}
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = tar([file(name, body) for name, body in named.items()], format=format)
        reader = TarReader(iter([data]))
        read = [(one.name, b"".join(map(bytes, reader.data()))) for one in reader]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            expected = [(one.name, archive.extractfile(one).read()) for one in archive]  # type: ignore[union-attr]
        assert read == [("/".join(p for p in n.split("/") if p not in ("", ".")), body) for n, body in expected]


@pytest.mark.parametrize(("name", "size"), [("a", 5), ("blobs/sha512/" + "a" * 128, 5), ("a" * 101, 0), ("ü" * 60, 1)])
def test_headers_are_read_by_tarfile(name: str, size: int) -> None:
    data = header(name, size) + bytes(size) + padding(size) + tars.END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        (one,) = archive.getmembers()
    assert (one.name, one.size, one.mtime, one.uid) == (name, size, 0, 0)


def test_sizes_past_eight_gibibytes_are_written_and_read() -> None:
    size = 1 << 35
    with tarfile.open(fileobj=io.BytesIO(header("big", size))) as archive:
        assert archive.next().size == size  # type: ignore[union-attr]
    reader = TarReader(iter([header("big", size)]))
    assert next(iter(reader)).size == size
