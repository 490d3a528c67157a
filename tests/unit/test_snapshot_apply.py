"""Layers from hostile and broken hands: nothing leaves the root, and what is wrong is told with its canonical code."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from shoal_bus.archive.decompress import zstd
from shoal_bus.archive.tar import TarReader
from shoal_snapshot import disk
from shoal_snapshot.apply import stream
from shoal_snapshot.apply.errors import ApplyError, Corrupt
from shoal_snapshot.apply.extract import extract
from shoal_snapshot.apply.stream import Blob, LayerStream

from tests.support import images
from tests.support.images import directory, entry, file, hardlink, opaque, symlink, whiteout
from tests.support.snapshotter_suite import write_blob

SECRET = "kept as it was"


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What no archive may touch."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_text(SECRET)
    return place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "root"
    place.mkdir()
    return place


def apply(root: Path, entries: Sequence[images.Entry], lowers: Sequence[Path] = ()) -> int:
    tar = images.Layer(entries).tar()
    return extract(TarReader(iter([tar])), str(root), [str(lower) for lower in lowers]).entries


def code_of(error: pytest.ExceptionInfo[ApplyError]) -> str:
    assert "\n" not in error.value.message
    return error.value.code


# ------------------------------------------------------------------------------------------------------ out of the root


@pytest.mark.parametrize(
    "name", ["/etc/x", "../../x", "a/../../../x", "./../x", "a/b/../../../../../../x", "//x", "x/."]
)
def test_absolute_and_dotted_names_stay_inside(root: Path, outside: Path, name: str) -> None:
    apply(root, [file(name, b"inside")])
    inside = [p for p in root.rglob("x") if p.is_file()]
    assert len(inside) == 1
    assert sorted(p.name for p in root.parent.iterdir()) == ["outside", "root"]


@pytest.mark.parametrize("target", ["{outside}", "../outside", "../../../../../../../../..{outside}", "/"])
def test_a_link_leads_nowhere_outside(root: Path, outside: Path, target: str) -> None:
    to = target.format(outside=outside)
    apply(root, [symlink("link", to), file("link/secret", b"overwritten"), file("link/new", b"")])
    assert (outside / "secret").read_text() == SECRET
    assert [p.name for p in outside.iterdir()] == ["secret"]
    assert str((root / "link").readlink()) == to


def test_links_through_links_lead_nowhere_outside(root: Path, outside: Path) -> None:
    apply(root, [symlink("a", ".."), symlink("b", "a/.."), symlink("c", "b/outside"), file("c/secret", b"overwritten")])
    assert (outside / "secret").read_text() == SECRET


@pytest.mark.parametrize("below", [False, True])
def test_an_earlier_layers_link_leads_nowhere_outside(root: Path, outside: Path, tmp_path: Path, below: bool) -> None:
    """A link of a layer below; and of an earlier layer applied to the same directory."""
    lower = tmp_path / "lower" if below else root
    lower.mkdir(exist_ok=True)
    apply(lower, [symlink("etc", str(outside)), symlink("up", "../" * 20)])
    names = ["etc/secret", f"up{outside}/secret"]
    apply(root, [*(file(name, b"overwritten") for name in names), whiteout("etc/secret")], [lower] if below else [])
    assert (outside / "secret").read_text() == SECRET
    assert [p.name for p in outside.iterdir()] == ["secret"]


def test_a_file_replaces_a_link_instead_of_following_it(root: Path, outside: Path) -> None:
    apply(root, [symlink("secret", str(outside / "secret")), file("secret", b"new")])
    assert (outside / "secret").read_text() == SECRET
    assert (root / "secret").read_bytes() == b"new"


def test_attributes_are_not_set_through_a_link(root: Path, outside: Path) -> None:
    before = (outside / "secret").stat()
    apply(root, [symlink("x", str(outside / "secret"), uid=1, gid=2, mtime=3), directory("y"), symlink("y/z", "../x")])
    after = (outside / "secret").stat()
    assert (after.st_uid, after.st_mode, after.st_mtime_ns) == (before.st_uid, before.st_mode, before.st_mtime_ns)
    assert os.lstat(root / "x").st_uid == 1


@pytest.mark.parametrize("target", ["{outside}/secret", "../outside/secret", "link/secret"])
def test_a_hard_link_to_what_is_outside_is_refused(root: Path, outside: Path, target: str) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [symlink("link", str(outside)), hardlink("mine", target.format(outside=outside))])
    assert code_of(error) == "FAILED_PRECONDITION"
    assert (outside / "secret").stat().st_nlink == 1


def test_a_hard_link_to_a_link_is_of_the_link_itself(root: Path, outside: Path) -> None:
    apply(root, [symlink("a", str(outside / "secret")), hardlink("b", "a"), file("b", b"new")])
    assert (outside / "secret").read_text() == SECRET


def test_a_directory_replaced_by_a_link_in_the_middle_leads_nowhere(root: Path, outside: Path) -> None:
    entries = [directory("d"), file("d/a"), symlink("d", str(outside)), file("d/secret", b"overwritten")]
    apply(root, entries)
    assert (outside / "secret").read_text() == SECRET


@pytest.mark.parametrize("name", [".wh...", ".wh..", ".wh."])
def test_a_whiteout_of_nothing_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    with pytest.raises(ApplyError) as error:
        apply(root, [file(name)], [lower])
    assert code_of(error) == "FAILED_PRECONDITION"


def test_a_layer_brings_no_marks_of_overlayfs(root: Path) -> None:
    pax = {"SCHILY.xattr.trusted.overlay.redirect": "/../../etc", "SCHILY.xattr.trusted.overlay.opaque": "y"}
    apply(root, [directory("d", pax_headers=pax), file("f", pax_headers={"SCHILY.xattr.user.ok": "1"})])
    assert os.listxattr(root / "d") == []
    assert os.getxattr(root / "f", "user.ok") == b"1"


# ------------------------------------------------------------------------------------------------------- too much of it


def test_links_in_circles_are_refused(root: Path) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [symlink("a", "b"), symlink("b", "a"), file("a/x")])
    assert code_of(error) == "FAILED_PRECONDITION"


def test_directories_too_deep_are_refused(root: Path) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [file("/".join("d" for _ in range(1100)) + "/x")])
    assert code_of(error) == "FAILED_PRECONDITION"


def test_a_path_too_long_is_refused(root: Path) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [file("/".join("d" * 200 for _ in range(30)) + "/x")])
    assert code_of(error) == "FAILED_PRECONDITION"


def test_a_name_too_long_is_refused(root: Path) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [file("n" * 300)])
    assert code_of(error) == "FAILED_PRECONDITION"
    assert len(error.value.message) < 400


def test_a_member_that_claims_more_than_there_is_is_data_loss(root: Path) -> None:
    info = tarfile.TarInfo("big")
    info.size = 1 << 40
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([info.tobuf(tarfile.GNU_FORMAT) + bytes(5120)])), str(root))
    assert code_of(error) == "DATA_LOSS"


def test_an_endless_header_is_data_loss(root: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([info.tobuf(tarfile.GNU_FORMAT) + bytes(5120)])), str(root))
    assert code_of(error) == "DATA_LOSS"


@pytest.mark.parametrize("record", ["13 path=x\0y\n", "24 SCHILY.xattr.user.a\0=b\n", "0 a=b\n", "99 a=b\n", "a=b\n"])
def test_malformed_pax_records_are_data_loss(root: Path, record: str) -> None:
    body = record.encode()
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    data = header.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0") + tarfile.TarInfo("x").tobuf() + bytes(1024)
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([data])), str(root))
    assert code_of(error) == "DATA_LOSS"


@pytest.mark.parametrize("value", [b"\x80" + b"\x7f" * 11, b"\xff" + b"\x80" * 11])
def test_times_out_of_bounds_are_1970(root: Path, value: bytes) -> None:
    extract(TarReader(iter([_header(tarfile.REGTYPE, 136, value)])), str(root))
    assert (root / "x").stat().st_mtime == 0


@pytest.mark.parametrize("place", [329, 337])
@pytest.mark.parametrize("value", [b"\x80" + b"\x7f" * 7, b"\xff" + b"\x80" * 7, b"7777777\0"])
def test_devices_that_cannot_be_are_refused(root: Path, place: int, value: bytes) -> None:
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([_header(tarfile.CHRTYPE, place, value)])), str(root))
    assert code_of(error) == "FAILED_PRECONDITION"
    assert list(root.iterdir()) == []


def _header(kind: bytes, place: int, value: bytes) -> bytes:
    """An archive of one member `x`, with `value` at a place in its header."""
    info = tarfile.TarInfo("x")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[place : place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


# ---------------------------------------------------------------------------------------------------------------- kinds


def test_every_kind_of_member_is_made(root: Path) -> None:
    pax = {"SCHILY.xattr.user.a": "b"}
    apply(
        root,
        [
            directory("d", 0o1751, uid=5, gid=6, mtime=1_000),
            file("d/f", b"data", 0o4755, uid=1, gid=2, mtime=2_000, pax_headers=pax),
            entry("d/h", tarfile.LNKTYPE, 0o4755, linkname="d/f", uid=1, gid=2, mtime=2_000),
            symlink("d/s", "f", uid=3, gid=4, mtime=3_000),
            entry("d/c", tarfile.CHRTYPE, 0o620, devmajor=5, devminor=1, gid=5),
            entry("d/b", tarfile.BLKTYPE, 0o660, devmajor=7, devminor=0),
            entry("d/p", tarfile.FIFOTYPE, 0o600, pax_headers=pax),
        ],
    )
    d, f = (root / "d").stat(), (root / "d/f").stat()
    assert (stat.S_IMODE(d.st_mode), d.st_uid, d.st_gid, d.st_mtime) == (0o1751, 5, 6, 1_000)
    assert (stat.S_IMODE(f.st_mode), f.st_uid, f.st_gid, f.st_nlink) == (0o4755, 1, 2, 2)
    assert os.getxattr(root / "d/f", "user.a") == b"b"
    assert (root / "d/h").read_bytes() == b"data"
    s, c, b = os.lstat(root / "d/s"), os.lstat(root / "d/c"), os.lstat(root / "d/b")
    assert (s.st_uid, s.st_mtime, str((root / "d/s").readlink())) == (3, 3_000, "f")
    assert stat.S_ISCHR(c.st_mode)
    assert (c.st_rdev, stat.S_IMODE(c.st_mode), c.st_gid) == (os.makedev(5, 1), 0o620, 5)
    assert stat.S_ISBLK(b.st_mode)
    assert stat.S_ISFIFO(os.lstat(root / "d/p").st_mode)


def test_a_user_attribute_that_a_file_refuses_is_an_error(root: Path) -> None:
    with pytest.raises(ApplyError) as error:
        apply(root, [file("f", pax_headers={"SCHILY.xattr.user.big": "x" * 70_000})])
    assert code_of(error) == "FAILED_PRECONDITION"


def test_the_later_of_two_members_of_one_name_wins(root: Path) -> None:
    apply(root, [directory("x"), file("x/y"), file("x", b"1"), file("x", b"2"), directory("x"), file("x/z")])
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*")) == ["x", "x/z"]


def test_whiteouts_become_what_overlayfs_understands(root: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    apply(lower, [directory("d", 0o700, uid=9), file("d/a"), file("e/a"), file("g")])
    apply(root, [whiteout("d/a"), opaque("e"), file("e/b"), whiteout("g"), whiteout("never/there")], [lower])
    for name in ("d/a", "g"):
        status = os.lstat(root / name)
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == 0
    assert os.getxattr(root / "e", "trusted.overlay.opaque") == b"y"
    implied = (root / "d").stat()
    assert (stat.S_IMODE(implied.st_mode), implied.st_uid) == (0o700, 9)


# ------------------------------------------------------------------------------------------------------- broken streams


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_truncated_layer_is_data_loss(tmp_path: Path, root: Path, compression: str) -> None:
    layer = images.Layer([file(f"f{i}", os.urandom(3_000)) for i in range(20)], compression)  # type: ignore[arg-type]
    path, whole, diff_id = write_blob(tmp_path, layer)
    data = path.read_bytes()
    for size in (0, 1, 3, 17, 600, len(data) // 2, len(data) - 9, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ApplyError) as error:
            _apply_blob(path, whole.media_type, whole.digest, whole.size, diff_id, root)
        assert code_of(error) == "DATA_LOSS", size
        # Also when the digest is right: whoever pushed it had only that much.
        short = images.digest_of(data[:size])
        with pytest.raises(ApplyError):
            _apply_blob(path, whole.media_type, short, size, diff_id, root)


def test_wrong_bytes_are_data_loss_and_a_wrong_diff_id_a_failed_precondition(tmp_path: Path, root: Path) -> None:
    path, blob, diff_id = write_blob(tmp_path, images.Layer([file("f", os.urandom(100_000))], "none"))
    other = images.digest_of(b"other")
    for digest, diff, size, code in (
        (other, diff_id, blob.size, "DATA_LOSS"),
        (blob.digest, other, blob.size, "FAILED_PRECONDITION"),
        (blob.digest, diff_id, blob.size + 1, "DATA_LOSS"),
        (blob.digest, diff_id, blob.size - 1, "DATA_LOSS"),
    ):
        with pytest.raises(ApplyError) as error:
            _apply_blob(path, blob.media_type, digest, size, diff, root)
        assert code_of(error) == code
    _apply_blob(path, blob.media_type, blob.digest, blob.size, diff_id, root)


def test_garbage_is_refused(tmp_path: Path, root: Path) -> None:
    for head in (b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"not an archive at all"):
        path = tmp_path / "garbage"
        path.write_bytes(head + os.urandom(5_000))
        digest = images.digest_of(path.read_bytes())
        with pytest.raises(ApplyError) as error:
            _apply_blob(path, "application/vnd.oci.image.layer.v1.tar", digest, path.stat().st_size, "", root)
        assert code_of(error) == "DATA_LOSS"


def test_a_compression_that_nobody_knows_is_refused(tmp_path: Path, root: Path) -> None:
    path, blob, _ = write_blob(tmp_path, images.Layer([file("f")], "none"))
    with pytest.raises(ApplyError) as error:
        _apply_blob(path, f"{blob.media_type}+brotli", blob.digest, blob.size, "", root)
    assert code_of(error) == "FAILED_PRECONDITION"


def test_a_blob_that_is_no_file_is_refused(tmp_path: Path, root: Path) -> None:
    digest = images.digest_of(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").touch()
    for path, code in ((tmp_path / name, "NOT_FOUND") for name in ("nothing", "root", "link", "link/x", "../x")):
        with pytest.raises(ApplyError) as error:
            _apply_blob(path, "application/vnd.oci.image.layer.v1.tar", digest, 0, "", root)
        assert code_of(error) == code


def test_every_end_of_a_zstd_stream_that_is_no_frames_end_is_told() -> None:
    data = os.urandom(3_000) + bytes(300_000)
    one = zstandard.ZstdCompressor(3, write_checksum=True).compress(data)
    writer = zstandard.ZstdCompressor(3).compressobj()
    other = writer.compress(data) + writer.flush()
    skippable = (0x184D2A5F).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"ignored"
    stream = one + skippable + other
    assert b"".join(zstd(Bytes(stream))) == data + data
    ends = {len(one), len(one) + len(skippable), len(stream)}
    for size in range(1, len(stream)):
        if size not in ends:
            with pytest.raises(Corrupt):
                b"".join(zstd(Bytes(stream[:size])))


class Bytes(io.BytesIO):
    """Compressed bytes, and how much memory was wanted for them."""

    reserved = 0

    def reserve(self, size: int) -> None:
        self.reserved = max(self.reserved, size)


@pytest.mark.parametrize("window", [1 << 20, 1 << 23, 1 << 25])
@pytest.mark.parametrize("sized", [False, True])
def test_the_window_of_a_zstd_frame_is_told_before_it_is_needed(window: int, sized: bool) -> None:
    data = os.urandom(1 << 20) * 40
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window.bit_length() - 1)
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(data) if sized else -1)
    source = Bytes(made.compress(data) + made.flush())
    assert sum(map(len, zstd(source))) == len(data)
    assert source.reserved == window


def _apply_blob(path: Path, media_type: str, digest: str, size: int, diff_id: str, root: Path) -> None:
    blob = Blob(str(path.parent), path.name, media_type, digest, size)
    with LayerStream(blob, diff_id) as layer:
        extract(TarReader(layer.chunks()), str(root))
        layer.verify(diff_id)


def test_a_worker_loads_nothing_heavy() -> None:
    loaded = "import sys, shoal_snapshot.apply.worker; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-P", "-c", loaded], check=True, capture_output=True, text=True).stdout
    heavy = {"pydantic", "nats", "asyncio", "structlog"}
    assert not heavy & {module.partition(".")[0] for module in told.split()}
    of_the_bus = {module for module in told.split() if module.startswith("shoal_bus.")}
    assert {module.split(".")[1] for module in of_the_bus} <= {"archive", "lazy"}


# ------------------------------------------------------------------------------------------------- more hostile layers


def test_a_directory_that_is_swapped_for_a_link_meanwhile_leads_nowhere(root: Path, outside: Path) -> None:
    """Somebody who can write to the layer replaces a directory by a link and back, as fast as he can."""
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        link, aside = root / "link", root / "aside"
        link.symlink_to(outside)
        while not stop.is_set():
            with suppress(OSError):
                (root / "d").rename(aside)
                link.rename(root / "d")
                (root / "d").rename(link)
                aside.rename(root / "d")
                swaps += 1

    entries = [directory("d"), *(file(f"d/sub{n % 7}/secret{n}", b"overwritten", 0o4755, uid=3) for n in range(300))]
    entries += [entry("d/secret", tarfile.CHRTYPE, 0o777, devmajor=1, devminor=3, uid=4), hardlink("d/l", "d/secret")]
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(20):
            with suppress(ApplyError):
                apply(root, entries)
    finally:
        stop.set()
        swapper.join()
    assert swaps
    status = (outside / "secret").stat()
    assert ((outside / "secret").read_text(), status.st_uid, status.st_nlink) == (SECRET, 0, 1)
    assert [p.name for p in outside.iterdir()] == ["secret"]


@pytest.mark.parametrize("name", [b"new\nline", b"\xff\xfe", b"caf\xe9", b"\x1b[2J", b"\\n", b"a\tb ", b"\xed\xa0\x80"])
def test_names_are_kept_byte_for_byte(root: Path, name: bytes) -> None:
    raw = os.fsdecode(name)
    long = f"{'d' * 90}/{raw}/{'x' * 60}"  # a PAX header, or GNU's long names
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
            for path in (raw, long):
                tar.addfile(tarfile.TarInfo(path))
        extract(TarReader(iter([buffer.getvalue()])), str(root))
        assert sorted(os.fsencode(path.name) for path in root.iterdir()) == sorted([name, b"d" * 90])
        assert [os.fsencode(path.name) for path in (root / ("d" * 90)).iterdir()] == [name]


@pytest.mark.parametrize("target", ["{outside}", "../outside", "here"])
@pytest.mark.parametrize("below", [False, True])
def test_a_whiteout_through_a_link_stays_inside(
    root: Path, outside: Path, tmp_path: Path, target: str, below: bool
) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    link = symlink("link", target.format(outside=outside))
    apply(lower, [directory("here"), file("here/secret"), *([link] if below else [])])
    layer = [*([] if below else [link]), whiteout("link/secret"), opaque("link")]
    apply(root, layer, [lower])
    assert (outside / "secret").read_text() == SECRET
    assert os.listxattr(outside) == []
    if target == "here":
        assert stat.S_ISCHR(os.lstat(root / "here/secret").st_mode)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_every_end_but_the_last_is_data_loss(tmp_path: Path, compression: str) -> None:
    """Each length that a layer may be cut to: as a blob that is too short, and as one that somebody pushed so."""
    layer = images.Layer([file("a", b"1"), file("b" * 120, b"2" * 600), directory("d")], compression)  # type: ignore[arg-type]
    path, whole, diff_id = write_blob(tmp_path, layer)
    data = path.read_bytes()
    ends = len(data.rstrip(b"\0"))  # of the last header; two blocks of zeros follow
    for size in range(0, len(data), 1 if compression == "gzip" else 37):
        path.write_bytes(data[:size])
        place = tmp_path / f"root-{size}"
        place.mkdir()
        with pytest.raises(Corrupt):
            _apply_blob(path, whole.media_type, whole.digest, whole.size, diff_id, place)
        with pytest.raises(ApplyError):
            _apply_blob(path, whole.media_type, images.digest_of(data[:size]), size, diff_id, place)
        # An archive may end without its blocks of zeros, but nowhere else.
        if size % 512 and (compression == "gzip" or size < ends):
            with pytest.raises(Corrupt):
                _apply_blob(path, whole.media_type, images.digest_of(data[:size]), size, "", place)


def test_a_bomb_is_stopped_by_its_ratio_and_by_what_follows_the_archive(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BOMB_BYTES", 1 << 20)
    zeros = images.Layer([file("zeros", bytes(1 << 26))], "zstd")
    path, blob, diff_id = write_blob(tmp_path, zeros)
    with pytest.raises(ApplyError) as error:
        _apply_blob(path, blob.media_type, blob.digest, blob.size, diff_id, root)
    assert code_of(error) == "RESOURCE_EXHAUSTED"
    gzipped, blob, diff_id = write_blob(tmp_path, images.Layer(zeros.entries, "gzip"))
    _apply_blob(gzipped, blob.media_type, blob.digest, blob.size, diff_id, root)  # as much as gzip can do is honest
    tail = images.Layer([file("f")]).tar() + bytes((1 << 26) + (1 << 20))
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([tail[at : at + 65536] for at in range(0, len(tail), 65536)])), str(root))
    assert code_of(error) == "FAILED_PRECONDITION"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_that_pile_up_before_one_member_are_data_loss(root: Path, kind: bytes) -> None:
    def headers() -> Iterator[bytes]:
        for number in range(10_000):
            body = b"%d SCHILY.xattr.user.a%05d=%s\n" % (0, number, b"x" * 400)
            body = b"%d" % (len(body) + 2) + body[1:]
            header = tarfile.TarInfo("x")
            header.type, header.size = kind, len(body)
            yield header.tobuf(tarfile.GNU_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")

    with pytest.raises(ApplyError, match="extended headers"):
        extract(TarReader(headers()), str(root))


@pytest.mark.parametrize("value", [b"1_7", b"0o17", b"+7", b"-7", b"0x7", b"8", b"1 7", b"1\xb2"])
@pytest.mark.parametrize("place", [100, 108, 124, 136])
def test_numbers_that_are_not_octal_are_data_loss(root: Path, value: bytes, place: int) -> None:
    with pytest.raises(ApplyError) as error:
        extract(TarReader(iter([_header(tarfile.REGTYPE, place, value + b"\0")])), str(root))
    assert code_of(error) == "DATA_LOSS"


def test_many_tiny_entries_take_bounded_memory(root: Path) -> None:
    """Directories with attributes, names that lead around, hard links: whatever might be remembered of each."""
    script = """
import os, sys, tarfile
from shoal_snapshot import disk
from shoal_snapshot.apply import directories
from shoal_snapshot.apply.extract import extract
from shoal_bus.archive.tar import TarReader

os.umask(0)
directories._MAX_KNOWN_BYTES = directories._MAX_PENDING_BYTES = int(sys.argv[2])

def entries():
    for n in range(8_000):
        path = f"{n % 100}/{'n' * 100}{n}"
        for name, kind in ((path, tarfile.DIRTYPE), (f"{path}/../{n}", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind, 0o2711, n
            yield info.tobuf(tarfile.GNU_FORMAT)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
extract(TarReader(entries()), sys.argv[1])
assert disk.usage(sys.argv[1])[1] == 16_101
print(peak() - before)
"""

    def grown(bound: int, place: Path) -> int:
        place.mkdir()
        command = [sys.executable, "-c", script, str(place), str(bound)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    bounded, unbounded = grown(1 << 17, root / "bounded"), grown(1 << 40, root / "unbounded")
    assert 3 * bounded < unbounded
    for number in (0, 77, 7_999):
        status = (root / "bounded" / str(number % 100) / f"{'n' * 100}{number}").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o2711, number)


def test_hard_links_count_once(root: Path) -> None:
    apply(root, [file("a", bytes(8192)), *(hardlink(f"l{n}", "a") for n in range(5)), file("b", bytes(4096))])
    assert disk.usage(str(root)) == (root.stat().st_blocks * 512 + 12288, 3)
