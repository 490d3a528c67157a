"""Images mounted for a look into them: a view of their snapshot, mounted read-only where the user wants it.

The view is the record, in its labels: which image, on which directory, since which boot, in which mount namespace. It
comes before the mount and goes after it, so that whatever dies in between, a view without its mount is left, which the
next of these commands removes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal_bus.api import content, snapshot
from shoal_bus.client import Client
from shoal_bus.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, from_exception
from shoal_bus.message import now
from shoal_bus.mount import is_mounted, mount_points, mount_read_only, unmount
from shoal_bus.node import Node
from shoal_bus.types import Mount

_LABEL = "shoal/image-mount."
_IMAGE, _DIRECTORY, _BOOT, _NAMESPACE = (f"{_LABEL}{what}" for what in ("image", "directory", "boot", "mnt"))
_GC_ROOT = "containerd.io/gc.root"


@dataclass(frozen=True)
class ImageMount:
    """One image that is mounted."""

    image: str
    directory: str
    snapshotter: str
    key: str


class ImageMounts:
    """The mounted images of one namespace of the node on this machine."""

    def __init__(self, client: Client, state: Path, snapshotter: str) -> None:
        if os.geteuid() != 0:
            raise PermissionDenied("only root may mount images", hint="run as root, on the node")
        self._client, self._state, self._snapshotter = client, state, snapshotter

    async def mount(self, image: str, directory: Path, *, platform: str) -> ImageMount:
        """Mounts an image on a directory that is there, and not a mount point yet."""
        place = _real(directory)
        with self._exclusively():
            await self._sweep()
            if is_mounted(place):
                raise FailedPrecondition(f"{place}: something is mounted there already")
            request = content.UnpackImage(name=image, platform=platform, snapshotter=self._snapshotter)
            chain_id = (await self._client.operate(content.IMAGE_UNPACK, request)).chain_id
            if not chain_id:
                raise FailedPrecondition(f"image {image}: has no layers, there is nothing to look at")
            made = ImageMount(image, str(place), self._snapshotter, f"image-mount-{secrets.token_hex(8)}")
            mounts = await self._client.call(
                snapshot.SNAPSHOT_VIEW.on(self._snapshotter),
                snapshot.PrepareSnapshot(key=made.key, parent=chain_id, labels=_labels(made)),
            )
            try:
                _here(mounts.mounts, self._client.node)
                try:
                    mount_read_only(mounts.mounts, place)
                except OSError as error:
                    raise from_exception(error) from None
            except BaseException:
                await self._remove(made.key)
                raise
        return made

    async def unmount(self, directory: Path) -> ImageMount:
        """Unmounts the image that is mounted on a directory. NOT_FOUND where none is."""
        place = _real(directory, needed=False)
        with self._exclusively():
            found = [one for one in await self.mounted() if one.directory == str(place)]
            if not found:
                await self._sweep()
                raise NotFound(f"{place}: no image is mounted there", hint="see `shoal image mounts`")
            try:
                unmount(place)
            except OSError as error:
                raise from_exception(error) from None
            for one in found:
                await self._remove(one.key)
            await self._sweep()
        return found[0]

    async def mounted(self) -> list[ImageMount]:
        """What is mounted, by directory."""
        return [
            ImageMount(
                view.labels.get(_IMAGE, ""), view.labels.get(_DIRECTORY, ""), self._snapshotter, view.key
            )
            for view in await self._views()
            if not _is_stale(view)
        ]  # fmt: skip

    async def forget_gone(self) -> None:
        """Removes the views of mounts that are gone: by a reboot, by umount(8), or since they never came to be."""
        with self._exclusively():
            await self._sweep()

    async def _views(self) -> list[snapshot.SnapshotInfo]:
        request = snapshot.ListSnapshots(filters=[f'labels."{_DIRECTORY}"'])
        found = await self._client.collect(snapshot.SNAPSHOT_LIST.on(self._snapshotter), request)
        return sorted(found, key=lambda view: view.labels.get(_DIRECTORY, ""))

    async def _sweep(self) -> None:
        for view in await self._views():
            if _is_stale(view):
                await self._remove(view.key)

    async def _remove(self, key: str) -> None:
        try:
            await self._client.call(snapshot.SNAPSHOT_REMOVE.on(self._snapshotter), snapshot.SnapshotRequest(key=key))
        except NotFound:
            return

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """While a view has no mount yet: to another command it would be one of a mount that is gone."""
        try:
            self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._state / "image-mounts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_exception(error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


async def forget_gone(node: Node) -> None:
    """Removes what is left of mounts that are gone, in every namespace of a node: none outlives a reboot."""
    async with Client.open(node.address, node.name, name="shoal-up") as client:
        for namespace in await client.collect(content.NAMESPACE_LIST, content.ListNamespaces()):
            of_namespace = client.with_namespace(namespace.name)
            await ImageMounts(of_namespace, node.state, snapshot.DEFAULT).forget_gone()


def _labels(made: ImageMount) -> dict[str, str]:
    return {
        _IMAGE: made.image,
        _DIRECTORY: made.directory,
        _BOOT: _boot(),
        _NAMESPACE: _mount_namespace(),
        _GC_ROOT: now().isoformat(),
    }


def _is_stale(view: snapshot.SnapshotInfo) -> bool:
    """Whether a view's mount is certainly gone; of another mount namespace that can't be told while that may live."""
    if view.labels.get(_BOOT) != _boot():
        return True
    if view.labels.get(_NAMESPACE) != _mount_namespace():
        return False
    return os.fsencode(view.labels.get(_DIRECTORY, "")) not in mount_points()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _mount_namespace() -> str:
    return str(Path("/proc/self/ns/mnt").readlink())


def _real(directory: Path, *, needed: bool = True) -> Path:
    if needed and not directory.is_dir():
        raise InvalidArgument(f"{directory}: isn't a directory", hint="make it first")
    return directory.resolve()


def _here(mounts: list[Mount], node: str) -> None:
    """Whether the snapshot's files are on this machine. FAILED_PRECONDITION where they aren't."""
    for mount in mounts:
        places = [mount.source] if mount.source.startswith("/") else []
        for option in mount.options:
            key, _, value = option.partition("=")
            if key in ("lowerdir", "upperdir", "workdir"):
                places += value.split(":")
        if any(not Path(place).exists() for place in places):
            raise FailedPrecondition(
                f"node {node} isn't on this machine, or its files aren't to be seen from here",
                hint="mount the image where its node is",
            )
