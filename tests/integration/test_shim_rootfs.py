"""Root file systems that take a shim more than mount(2): with mapped owners, or served by a program."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Mount
from shoal_runtime.shim import loopback, mounts

from tests.support.leaks import Leaks
from tests.support.mount_lists import image, is_read_only, loops, no_loops
from tests.support.shims import Host, running_host, until

MAPPING = "0:100000:65536"
IDS = [f"uidmap={MAPPING}", f"gidmap={MAPPING}"]
USERS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]


@pytest.fixture
async def host(tmp_path: Path, leaks: Leaks) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as running:
        yield running


def overlay(host: Host, kind: str, *more: str, owner: int = 0) -> list[Mount]:
    """An overlay over the host's root file system, with an upper directory of its own."""
    options = [f"lowerdir={host.rootfs}"]
    for name in ("upper", "work"):
        place = host.directory / name
        place.mkdir()
        os.chown(place, owner, owner)
        options.append(f"{name}dir={place}")
    return [Mount(type=kind, source="overlay", options=[*options, *more])]


def serving(host: Host) -> list[psutil.Process]:
    """The processes that serve this host's file systems."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "fuse-overlayfs" and str(host.directory) in " ".join(process.info["cmdline"] or [])
    ]


async def test_a_program_serves_the_root_file_system_until_the_container_is_deleted(host: Host) -> None:
    rootfs = overlay(host, "fuse3.fuse-overlayfs")
    await host.run("fused", ["sh", "-c", "echo new > /new; rm /etc -r; sleep 1; cat /new && exit 4"], rootfs=rootfs)
    assert len(serving(host)) == 1
    assert (await host.exit_of("fused")).exit_status == 4
    assert [exit.id for exit in host.exits] == ["fused"]
    await host.idle("fused")
    assert len(serving(host)) == 1, "it serves on when the shim has nothing to do"
    deleted = await host.delete("fused")
    assert deleted is not None
    assert (host.directory / "upper/new").read_text() == "new\n"
    assert mounts.mounts_below(str(host.directory)) == []
    await until(lambda: serving(host) == [])
    assert list((host.state / "shims").iterdir()) == []


async def test_a_program_that_is_not_there_is_told(host: Host) -> None:
    rootfs = [Mount(type="fuse3.no-such-program", source="x", options=[])]
    with pytest.raises(FailedPrecondition, match="no-such-program isn't installed"):
        await host.create("fused", ["true"], rootfs=rootfs)
    assert mounts.mounts_below(str(host.directory)) == []


async def test_what_a_program_says_is_told(host: Host) -> None:
    rootfs = [Mount(type="fuse3.fuse-overlayfs", source="x", options=["lowerdir=/no/such/place"])]
    with pytest.raises(FailedPrecondition, match="fuse-overlayfs: "):
        await host.create("fused", ["true"], rootfs=rootfs)
    assert mounts.mounts_below(str(host.directory)) == []
    assert serving(host) == []


@pytest.fixture
async def open_host(leaks: Leaks) -> AsyncIterator[Host]:
    """A host whose directories others than root can pass through: a container's root is one of them."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shoal-test-") as place:
        Path(place).chmod(0o755)
        async with running_host(Path(place)) as running:
            yield running


@pytest.mark.parametrize("kind", ["overlay", "bind"])
async def test_files_are_the_containers_own_in_a_user_namespace(open_host: Host, kind: str) -> None:
    host = open_host
    if kind == "overlay":
        rootfs = overlay(host, "overlay", *IDS, owner=100_000)
        place, owner = host.directory / "upper/new", 100_000
    else:
        rootfs = [Mount(type="bind", source=str(host.rootfs), options=["rbind", "rw", *IDS])]
        place, owner = host.rootfs / "new", 0
    kinds = ("pid", "ipc", "uts", "mount", "network", "user")
    linux = {"uidMappings": USERS, "gidMappings": USERS, "namespaces": [{"type": kind} for kind in kinds]}
    script = "stat -c %u:%g /bin/busybox > /new; stat -c %u:%g / >> /new"
    await host.run("mapped", ["sh", "-c", script], rootfs=rootfs, linux=linux)
    assert (await host.exit_of("mapped")).exit_status == 0
    assert place.read_text() == "0:0\n0:0\n"
    assert (place.stat().st_uid, place.stat().st_gid) == (owner, owner)
    await host.delete("mapped")
    assert mounts.mounts_below(str(host.directory)) == []


async def test_a_mapping_that_the_kernel_refuses_is_told_and_undone(host: Host) -> None:
    rootfs = [Mount(type="bind", source="/proc", options=["rbind", "ro", *IDS])]
    with pytest.raises(FailedPrecondition, match="id mapping of /proc"):
        await host.create("mapped", ["true"], rootfs=rootfs)
    assert mounts.mounts_below(str(host.directory)) == []


@pytest.fixture
def disk(host: Host) -> Path:
    """An image with the host's root file system in it."""
    made, point = image(host.directory / "disk.img", mib=16), host.directory / "disk"
    point.mkdir()
    loopback.mount("ext4", str(made), str(point), ["loop"])
    shutil.copytree(host.rootfs, point, symlinks=True, dirs_exist_ok=True)
    mounts.unmount_all(str(point))
    assert no_loops(host.directory)
    return made


@pytest.mark.parametrize("options", [["loop"], ["ro", "loop"], ["loop", "direct-io", "noatime"]])
async def test_an_image_is_the_root_file_system_by_the_option_loop(host: Host, disk: Path, options: list[str]) -> None:
    rootfs = [Mount(type="ext4", source=str(disk), options=options)]
    status = 1 if "ro" in options else 0
    await host.run("looped", ["sh", "-c", "sleep 1; echo new > /new"], rootfs=rootfs)
    (device,) = loops(host.directory)
    assert is_read_only(device) == ("ro" in options)
    await host.idle("looped")
    assert (await host.exit_of("looped")).exit_status == status
    await host.delete("looped")
    assert mounts.mounts_below(str(host.directory)) == []
    assert no_loops(host.directory)


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (Mount(type="ext4", source="/no/such/image", options=["loop"]), "No such file or directory: /no/such/image"),
        (Mount(type="ext4", source="/etc/hostname", options=["loop"]), "mount ext4 on "),
        (Mount(type="tmpfs", source="x", options=["X-containerd.mkfs.size=1"]), "X-containerd.mkfs.size=1"),
    ],
)
async def test_an_image_that_cannot_be_mounted_is_told_and_undone(host: Host, mount: Mount, words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words):
        await host.create("looped", ["true"], rootfs=[mount])
    assert mounts.mounts_below(str(host.directory)) == []
    assert no_loops(host.directory)
    assert not any(b"hostname" in path.read_bytes() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
