"""What of a mount list is made by the mount manager, and its transforms: templates, directories, file systems."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from shoal_bus.api.runtime import ActiveMount
from shoal_bus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, ShoalError
from shoal_bus.types import Mount
from shoal_runtime.mount_manager.directories import with_directories
from shoal_runtime.mount_manager.filesystems import with_file_system
from shoal_runtime.mount_manager.plan import Step, may_need_one, plan_of
from shoal_runtime.mount_manager.templates import expand, filled_in

ACTIVE = [
    ActiveMount(
        mount=Mount(type="bind", source=f"/source{n}", target=f"/target{n}"),
        mounted_at=datetime.now(UTC), mount_point=f"/m/{n}",
    )
    for n in range(12)
]  # fmt: skip


def a(kind: str, source: str = "x", *options: str, target: str = "") -> Mount:
    return Mount(type=kind, source=source, target=target, options=list(options))


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("plain, with } and {", "plain, with } and {"),
        ("lowerdir={{ mount 0 }}", "lowerdir=/m/0"),
        ("{{mount 11}}", "/m/11"),
        ("{{ mount 1 }}/upper:{{  source  2 }}", "/m/1/upper:/source2"),
        ("a{{ target 3 }}b}}", "a/target3b}}"),
        ("{{ overlay 0 2 }}", "/m/0:/m/1:/m/2"),
        ("{{ overlay 2 0 }}", "/m/2:/m/1:/m/0"),
        ("{{ overlay 1 1 }}", "/m/1"),
    ],
)
def test_a_template_is_filled_in(text: str, expanded: str) -> None:
    assert expand(text, ACTIVE) == expanded


@pytest.mark.parametrize(
    "text",
    [
        "{{ mount 12 }}", "{{ mount -1 }}", "{{ mount }}", "{{ mount 0 1 }}", "{{ mount 0", "{{}}", "{{ overlay 0 }}",
        "{{ overlay 0 12 }}", "{{ overlay 12 0 }}", "{{ unmount 0 }}", "{{ mount 0 | len }}", "{{ mount 99999 }}",
        "{{ {{ mount 0 }} }}", "{{ if true }}x{{ end }}", "{{ mount \u0661 }}", "{{ MOUNT 0 }}",
    ],
)  # fmt: skip
def test_what_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^template"):
        expand(text, ACTIVE)


def test_source_target_and_options_are_filled_in() -> None:
    mount = a("overlay", "{{ mount 0 }}", "upperdir={{ mount 1 }}/u", "index=off", target="{{ target 2 }}")
    assert filled_in(mount, ACTIVE) == a("overlay", "/m/0", "upperdir=/m/1/u", "index=off", target="/target2")


# ----------------------------------------------------------------------------------------------------------- the plan


def told(steps: Sequence[Step]) -> list[str]:
    return [f"{'+'.join(step.transforms)}({step.mount.type})" for step in steps]


@pytest.mark.parametrize(
    ("types", "allowed", "here", "left"),
    [
        (["loop"], [], ["(loop)"], []),
        (["loop", "bind"], [], ["(loop)"], ["(bind)"]),
        (["bind", "xfs", "format/overlay"], [], ["(bind)", "(xfs)"], ["format(overlay)"]),
        (["bind", "format/overlay", "tmpfs"], [], ["(bind)"], ["format(overlay)", "(tmpfs)"]),
        (["format/bind", "loop", "bind"], [], ["format(bind)", "(loop)"], ["(bind)"]),
        (["mkfs/ext4", "format/mkdir/overlay"], [], ["mkfs(ext4)"], ["format+mkdir(overlay)"]),
        (["mkfs/loop", "mkdir/format/overlay"], [], ["mkfs(loop)"], ["format+mkdir(overlay)"]),
        (["mkdir/overlay"], [], [], ["mkdir(overlay)"]),
        (["loop", "format/ext4"], ["format/*"], ["(loop)"], ["(format/ext4)"]),
        (["loop", "format/ext4"], ["loop"], ["(loop)"], ["format(ext4)"]),
        (["format/bind", "loop", "bind"], ["format/bind"], ["format(bind)", "(loop)"], ["(bind)"]),
        (["bind", "mkdir/format/overlay"], ["format/*"], ["(bind)"], ["format+mkdir(overlay)"]),
    ],
)
def test_what_is_made_here(types: list[str], allowed: list[str], here: list[str], left: list[str]) -> None:
    plan = plan_of([a(kind) for kind in types], allowed=allowed)
    assert plan is not None
    assert (told(plan.here), told(plan.left), plan.bound) == (here, left, False)
    assert may_need_one([a(kind) for kind in types])


@pytest.mark.parametrize(
    ("types", "allowed"),
    [
        ([], []),
        (["bind"], []),
        (["overlay", "fuse3.x/y"], []),
        (["unknown/overlay"], []),
        (["loop", "bind"], ["loop"]),
        (["bind", "format/overlay"], ["format/*"]),
        (["bind", "mkdir/format/overlay"], ["format/*", "mkdir/*"]),
        (["bind", "mkdir/format/overlay"], ["mkdir/format/overlay"]),
    ],
)
def test_nothing_is_to_be_made_here(types: list[str], allowed: list[str]) -> None:
    assert plan_of([a(kind) for kind in types], allowed=allowed) is None


def test_a_temporary_activation_mounts_everything() -> None:
    plan = plan_of([a("bind"), a("format/bind")], temporary=True, allowed=["format/*"])
    assert plan is not None
    assert (told(plan.here), told(plan.left), plan.bound) == (["(bind)", "format(bind)"], [], True)
    assert plan_of([], temporary=True) is None
    with pytest.raises(InvalidArgument, match="must be a file system"):
        plan_of([a("loop")], temporary=True)


@pytest.mark.parametrize("mount", [a("format/"), a("mkfs/mkdir/"), a("loop", "a\0b"), a("bind", "x", "a\0")])
def test_what_is_no_mount_is_refused(mount: Mount) -> None:
    with pytest.raises(InvalidArgument):
        plan_of([mount])


# -------------------------------------------------------------------------------------------------------- directories


def make(root: Path, option: str) -> Mount:
    return with_directories([root], a("overlay", "overlay", "index=off", f"X-containerd.mkdir.{option}"))


@pytest.mark.parametrize(
    ("asked", "mode", "owner"),
    [("", 0o700, (0, 0)), (":0751", 0o751, (0, 0)), (":777:1000:65534", 0o777, (1000, 65534))],
)
def test_a_directory_is_made_as_it_is_asked_for(tmp_path: Path, asked: str, mode: int, owner: tuple[int, int]) -> None:
    umask = os.umask(0o077)
    try:
        assert make(tmp_path, f"path={tmp_path}/new{asked}").options == ["index=off"]
    finally:
        os.umask(umask)
    found = (tmp_path / "new").stat()
    assert (stat.S_IMODE(found.st_mode), (found.st_uid, found.st_gid)) == (mode, owner)


def test_a_directory_that_is_there_gets_what_is_asked_for_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old").chmod(0o755)
    make(tmp_path, f"path={tmp_path}/old")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o755
    make(tmp_path, f"path={tmp_path}/old:700:5:6")
    found = (tmp_path / "old").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o700, 5, 6)


@pytest.mark.parametrize(
    "option",
    [
        "path=/elsewhere/new", "path={root}", "path={root}/", "path={root}x/new", "path={root}/../new", "path=new",
        "path={root}/a/../b", "path={root}/./new", "path={root}/new:999", "path={root}/new:1777",
        "path={root}/new:755:1",
        "path={root}/new:755:1:x", "path={root}/new:755:4294967295:1", "path={root}/new:755:1:2:3", "path=", "mode=1",
        "path={root}/new:",
    ],
)  # fmt: skip
def test_no_directory_is_made_elsewhere_or_of_nonsense(tmp_path: Path, option: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(InvalidArgument):
        make(root, option.format(root=root))
    assert list(tmp_path.rglob("*")) == [root]


@pytest.mark.parametrize("path", ["link/new", "link", "missing/new", "file/new", "file", "up/outside/new"])
def test_no_directory_is_made_through_a_link(tmp_path: Path, path: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir(mode=0o755)
    (root / "link").symlink_to("../outside")
    (root / "up").symlink_to("..")
    (root / "file").touch()
    with pytest.raises(FailedPrecondition, match="link"):
        make(root, f"path={root}/{path}:0777")
    assert list(outside.iterdir()) == []
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


# ------------------------------------------------------------------------------------------------------- file systems

UUID = "550e8400-e29b-41d4-a716-446655440000"


def made(root: Path, *options: str, name: str = "image") -> Mount:
    return with_file_system([root], a("ext4", f"{root}/{name}", "loop", *(f"X-containerd.mkfs.{o}" for o in options)))


def blkid(path: Path) -> str:
    return subprocess.run(["blkid", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("kind", "size", "bytes"),
    [("ext4", "8MiB", 8 << 20), ("ext2", "4m", 4 << 20), ("ext3", "16777216", 16 << 20), ("xfs", "300MB", 300 << 20)],
)
def test_a_file_system_is_made_as_it_is_asked_for(tmp_path: Path, kind: str, size: str, bytes: int) -> None:
    assert made(tmp_path, f"fs={kind}", f"size={size}", f"uuid={UUID}").options == ["loop"]
    assert (tmp_path / "image").stat().st_size == bytes
    assert f'TYPE="{kind}"' in blkid(tmp_path / "image")
    assert f'UUID="{UUID}"' in blkid(tmp_path / "image")
    assert [entry.name for entry in tmp_path.iterdir()] == ["image"]


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    made(tmp_path, "size=8MiB", f"uuid={UUID}")
    made(tmp_path, "size=16MiB", "fs=ext2")
    assert (tmp_path / "image").stat().st_size == 8 << 20
    assert UUID in blkid(tmp_path / "image")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], InvalidArgument), (["size="], InvalidArgument), (["size=0"], InvalidArgument),
        (["size=-1"], InvalidArgument), (["size=1XB"], InvalidArgument), (["size=1000000PiB"], InvalidArgument),
        (["size=8MiB", "fs=btrfs"], InvalidArgument), (["size=8MiB", "fs=../sh"], InvalidArgument),
        (["size=8MiB", "uuid=random"], InvalidArgument), (["size=8MiB", "label=x"], InvalidArgument),
        (["size=8MiB", "fs"], InvalidArgument), (["size=1MiB", "fs=xfs"], FailedPrecondition),
        (["size=1"], FailedPrecondition),
        (["size=4000PiB"], (InvalidArgument, FailedPrecondition, ResourceExhausted)),
    ],
)  # fmt: skip
def test_what_is_no_file_system_is_refused(tmp_path: Path, options: list[str], error: type[ShoalError]) -> None:
    with pytest.raises(error):
        made(tmp_path, *options)
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_made_elsewhere_or_in_place_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "root/directory").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("../outside")
    (tmp_path / "root/up").symlink_to("..")
    for name in ("directory", "link", "up/outside"):
        with pytest.raises(FailedPrecondition):
            made(tmp_path / "root", "size=8MiB", name=name)
    for name in ("../outside", ""):
        with pytest.raises(InvalidArgument):
            made(tmp_path / "root", "size=8MiB", name=name)
    assert not (tmp_path / "outside").exists()


def test_a_program_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match=r"mkfs\.xfs: isn't installed") as caught:
        made(tmp_path, "size=300MiB", "fs=xfs")
    assert caught.value.hint == "install xfsprogs"
    assert list(tmp_path.iterdir()) == []
