"""The runtime service, or the host, goes while mounts are activated: what isn't whole is undone, or made whole."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import NotFound
from shoal_bus.types import Mount

from tests.support import bundle as bundles
from tests.support.gateway import until
from tests.support.leaks import mounts as mount_points
from tests.support.mount_lists import image, layered, left, loops, places, take_all_away
from tests.support.natsd import NatsServer
from tests.support.runtime import RuntimeNode, runtime_node

MKFS = """#!/bin/sh
touch "{directory}/formatting"
while [ ! -e "{directory}/done" ]; do sleep 0.02; done
{then}
"""
FORMAT = 'exec {mkfs} "$@"'


async def kill_after(node: RuntimeNode, delay: float) -> None:
    await asyncio.sleep(delay)
    node.copy().kill()
    await asyncio.to_thread(node.copy().start)


async def info(node: RuntimeNode, name: str) -> api.Activation:
    return await node.client.call(api.MOUNT_INFO, api.MountRequest(name=name))


async def listed(node: RuntimeNode) -> list[str]:
    return [one.name for one in await node.client.collect(api.MOUNT_LIST, api.ListMounts())]


def made_of(first: Path, second: Path) -> list[Mount]:
    """Of two images, the first of which is there: of four mounts, three are made before the second is formatted."""
    return [
        Mount(type="loop", source=str(first)),
        Mount(type="format/ext4", source="{{ mount 0 }}"),
        Mount(type="tmpfs", source="tmpfs"),
        Mount(type="mkfs/ext4", source=str(second), options=["X-containerd.mkfs.size=8MiB", "loop"]),
        Mount(type="format/overlay", source="overlay", options=["lowerdir={{ overlay 1 3 }}"]),
    ]


async def test_an_activation_and_its_end_survive_kills_at_any_point(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        first = image(tmp_path / "first.img")
        for n, delay in enumerate([0.004, 0.012, 0.03]):
            request = api.ActivateMounts(name="m", mounts=made_of(first, node.node.root / f"second{n}.img"))
            killing = asyncio.create_task(kill_after(node, delay))
            made = await node.client.call(api.MOUNT_ACTIVATE, request, timeout=60, patience=30)
            await killing
            assert len(made.active) == 4
            assert await info(node, "m") == made
            assert {one.mount_point for one in made.active[1:]} < mount_points()
            assert len(loops(tmp_path)) == 2
            killing = asyncio.create_task(kill_after(node, delay / 3))
            end = api.MountRequest(name="m")
            await node.client.call(api.MOUNT_DEACTIVATE, end, timeout=60, patience=30)
            await killing
            assert left(node.node) == await listed(node) == []


@pytest.mark.parametrize("formats", [True, False])
async def test_an_activation_killed_in_its_middle_is_made_whole_or_undone(
    tmp_path: Path, natsd: NatsServer, formats: bool
) -> None:
    """It is finished for a client that asks again; where that fails, nothing of it is left."""
    programs, done = tmp_path / "bin", tmp_path / "done"
    programs.mkdir()
    async with runtime_node(tmp_path, natsd) as node:
        assert node.copy().stop() == 0
        node.node.environment["PATH"] = f"{programs}:{node.node.environment['PATH']}"
        mkfs = programs / "mkfs.ext4"
        then = FORMAT.format(mkfs=shutil.which("mkfs.ext4")) if formats else "echo 'no, thank you' >&2; exit 1"
        first, second = image(tmp_path / "first.img"), node.node.root / "second.img"
        mkfs.write_text(MKFS.format(directory=tmp_path, then=then))
        mkfs.chmod(0o755)
        await asyncio.to_thread(node.copy().start)
        request = api.ActivateMounts(name="m", mounts=made_of(first, second))
        asking = asyncio.create_task(node.client.call(api.MOUNT_ACTIVATE, request, timeout=60, patience=30))
        try:
            await until((tmp_path / "formatting").exists)
            (tmp_path / "formatting").unlink()
            node.copy().kill()
            (before,) = places(node.node).iterdir()
            points = {str(before / str(number)) for number in (1, 2)}
            assert points < mount_points()
            assert len(loops(tmp_path)) == 1
            assert not second.exists()
            await asyncio.to_thread(node.copy().start)
            assert not before.exists(), "what isn't whole is gone before anybody is answered"
            assert not points & mount_points()
            with pytest.raises(NotFound):
                await info(node, "m")
        finally:
            done.touch()
        if formats:
            assert (await asking) == await info(node, "m")
            assert len(list(places(node.node).iterdir())) == 1
            await node.client.call(api.MOUNT_DEACTIVATE, api.MountRequest(name="m"))
        else:
            with pytest.raises(Exception, match="no, thank you"):
                await asking
        assert left(node.node) == await listed(node) == []
        assert second.exists() == formats


async def test_what_is_no_longer_mounted_is_forgotten(tmp_path: Path, natsd: NatsServer) -> None:
    """After a reboot, be the state directory on disk or not; what is still there stays."""
    async with runtime_node(tmp_path, natsd) as node:
        first = image(tmp_path / "first.img")
        mounts = made_of(first, node.node.root / "second.img")
        for name in ("wiped", "kept"):
            await node.client.call(
                api.MOUNT_ACTIVATE, api.ActivateMounts(name=name, mounts=mounts[2:3], temporary=True)
            )
        await node.client.call(api.MOUNT_ACTIVATE, api.ActivateMounts(name="gone", mounts=mounts))
        wiped = (await info(node, "wiped")).active[0].mount_point
        node.copy().kill()
        take_all_away(node.node)
        shutil.rmtree(Path(wiped).parent)
        await asyncio.to_thread(node.copy().start)
        assert left(node.node) == await listed(node) == []
        stays = await node.client.call(api.MOUNT_ACTIVATE, api.ActivateMounts(name="stays", mounts=mounts))
        stray = places(node.node) / "stray" / "0"
        stray.mkdir(parents=True)
        await kill_after(node, 0)
        assert await info(node, "stays") == stays
        assert [place.name for place in places(node.node).iterdir()] == [Path(stays.active[0].mount_point).parent.name]
        assert {one.mount_point for one in stays.active[1:]} < mount_points()
        await node.client.call(api.MOUNT_DEACTIVATE, api.MountRequest(name="stays"))
        assert left(node.node) == []


async def test_a_device_that_is_somebody_elses_by_now_is_let_be(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        mounts = [Mount(type="loop", source=str(image(tmp_path / "own.img")))]
        made = await node.client.call(api.MOUNT_ACTIVATE, api.ActivateMounts(name="m", mounts=mounts))
        link, other = Path(made.active[0].mount_point), image(tmp_path / "other.img")
        theirs = await node.client.call(
            api.MOUNT_ACTIVATE, api.ActivateMounts(name="theirs", mounts=[Mount(type="loop", source=str(other))])
        )
        take = link.readlink()
        link.unlink()
        link.symlink_to(theirs.active[0].data["device"])
        await node.client.call(api.MOUNT_DEACTIVATE, api.MountRequest(name="m"))
        assert loops(tmp_path) == sorted([str(take), theirs.active[0].data["device"]])
        assert await listed(node) == ["theirs"]
        await node.client.call(api.MOUNT_DEACTIVATE, api.MountRequest(name="theirs"))
        take_all_away(node.node)
        assert left(node.node) == []


async def test_a_task_whose_creation_is_killed_has_its_mounts_or_none(tmp_path: Path, natsd: NatsServer) -> None:
    async with runtime_node(tmp_path, natsd) as node:
        disk = image(tmp_path / "disk.img", "up", "work")
        for n, delay in enumerate([0.015, 0.04]):
            id = f"c{n}"
            await node.container(id, "sh", "-c", "exit 3")
            create = api.CreateTask(container_id=id, rootfs=layered(disk, node.rootfs, "up"))
            killing = asyncio.create_task(kill_after(node, delay))
            assert (await node.client.call(api.TASK_CREATE, create, timeout=60, patience=30)).status == "created"
            await killing
            assert len((await info(node, id)).active) == 2
            assert len(loops(tmp_path)) == 1
            await node.start(id)
            assert (await node.wait(id)).exit_status == 3
            killing = asyncio.create_task(kill_after(node, delay / 3))
            await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id), timeout=60, patience=30)
            await killing
            assert left(node.node) == await listed(node) == []
        await node.container("plain", "true")
        await node.client.call(api.TASK_CREATE, api.CreateTask(container_id="plain", rootfs=bundles.bind(node.rootfs)))
        assert await listed(node) == []
        await node.delete("plain")
