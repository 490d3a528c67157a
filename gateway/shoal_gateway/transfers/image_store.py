"""The image store, as one end of a transfer: which platforms, which names, and where it is unpacked to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from shoal_bus.api import content, snapshot
from shoal_bus.client import Unreached
from shoal_bus.collection import EXPIRE
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from shoal_bus.identifiers import check_identifier
from shoal_bus.types import Descriptor

from shoal_gateway.call import Call
from shoal_gateway.proto.containerd.types.platform_pb2 import Platform
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import ImageStore

_ELSEWHERE_SECONDS = 0.5
"""How long a snapshotter that isn't the snapshot service's may take to say that it is there."""
_OF_IMAGE = "containerd.io/gc.bref.image"
"""A label of a further name: it goes with the image that it names."""


def platforms_of(end: Sequence[Platform]) -> tuple[str, bool]:
    """One platform, and whether all are wanted: an operation takes one or all, so several are all."""
    return (platform_text(end[0]), False) if len(end) == 1 else ("", True)


def platform_text(platform: Platform) -> str:
    """A platform as OCI writes it: `os/architecture[/variant]`."""
    return "/".join(filter(None, (platform.os, platform.architecture, platform.variant)))


async def unpacking(call: Call, end: ImageStore, default: str) -> list[tuple[str, str]]:
    """What is to be unpacked where: platforms, and snapshotters. INVALID_ARGUMENT for one that isn't there."""
    wanted = [(platform_text(one.platform), one.snapshotter or default) for one in end.unpacks]
    others = {name for _, name in wanted} - {snapshot.DEFAULT}
    if others:
        every = call.items(snapshot.SNAPSHOTTER_LIST, snapshot.SnapshotterRequest())
        others -= {one.name async for one in every}
    for name in others:
        try:
            check_identifier(name, "snapshotter")
            info = snapshot.SNAPSHOT_INFO.on(name)
            await call.ask(info, snapshot.SnapshotterRequest(), step=f"info {name}", patience=_ELSEWHERE_SECONDS)
        except Unreached:
            raise InvalidArgument(f"snapshotter not loaded: {name}") from None
    return wanted


async def archive(call: Call, end: ImageStore, default: str) -> content.StoreArchive:
    """How an archive is stored there."""
    unpacks = await unpacking(call, end, default)
    return content.StoreArchive(
        index_name=end.name,
        index_names=[one.name for one in end.extra_references if not one.is_prefix],
        prefixes=[
            content.NamePrefix(
                name=one.name, allow_overwrite=one.allow_overwrite, add_digest=one.add_digest,
                skip_named_digest=one.skip_named_digest,
            )
            for one in end.extra_references
            if one.is_prefix
        ],
        further_labels=further_labels(end),
        platforms=[platform_text(one) for one in end.platforms],
        all_metadata=end.all_metadata,
        manifest_limit=end.manifest_limit,
        unpacks=[content.UnpackPlatform(platform=platform, snapshotter=name) for platform, name in unpacks],
    )  # fmt: skip


def further_names(end: ImageStore, target: Descriptor) -> list[str]:
    """The names besides its own that what isn't named by annotations gets."""
    return [
        f"{one.name}@{target.digest}" if one.is_prefix else one.name
        for one in end.extra_references
        if not one.is_prefix or one.add_digest
    ]


async def named(call: Call, end: ImageStore) -> content.Image:
    """The image that a source is. INVALID_ARGUMENT without a name, NOT_FOUND."""
    if not end.name:
        raise InvalidArgument("the source image has no name")
    return await call.ask(content.IMAGE_GET, content.ImageRequest(name=end.name))


async def names_of(call: Call, end: ImageStore) -> list[str]:
    """Every image that a source is, by name; each is there. UNIMPLEMENTED for prefixes."""
    if any(one.is_prefix for one in end.extra_references):
        raise Unimplemented("prefix lookup on export not implemented")
    names = [name for name in (end.name, *(one.name for one in end.extra_references)) if name]
    if not names:
        raise InvalidArgument("the source has no image's name")
    for name in names:
        await call.ask(content.IMAGE_GET, content.ImageRequest(name=name), step=f"get {name[:64]}")
    return names


async def store(call: Call, name: str, target: Descriptor, labels: dict[str, str], step: str) -> content.Image:
    """Has an image of that name be `target`, whether there is one or not."""
    while True:
        try:
            made = content.CreateImage(name=name, target=target, labels=labels)
            return await call.ask(content.IMAGE_CREATE, made, step=f"{step}.create")
        except AlreadyExists:
            changed = content.UpdateImage(name=name, target=target, labels=labels)
        try:
            return await call.ask(content.IMAGE_UPDATE, changed, step=f"{step}.update")
        except NotFound:
            step += "'"  # it was removed meanwhile


def further_labels(end: ImageStore) -> dict[str, str]:
    """Those of a further name: where the image has one of its own, it goes with that."""
    if not end.name:
        return dict(end.labels)
    return {**end.labels, _OF_IMAGE: end.name, EXPIRE: datetime.now(UTC).isoformat()}
