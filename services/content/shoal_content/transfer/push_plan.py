"""What a push sends, and in which order: blobs, the manifests that name them, the indexes that name those."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.blobs.layout import digest_of
from shoal_content.blobs.store import Store
from shoal_content.images.tree import check, choose_manifest

_DEEPEST = 8
_MOST = 1 << 14
_NOT_TO_BE_HANDED_ON = ("nondistributable", "rootfs.foreign")
"""Parts of the media types of layers that stay where their `urls` say (OCI image-spec, layer.md; Docker's schema 2)."""


@dataclass
class Plan:
    """All that a target leads to, each thing once."""

    target: Descriptor
    blobs: list[Descriptor] = field(default_factory=list)
    skipped: list[Descriptor] = field(default_factory=list)
    """Layers that may not be handed on."""
    manifests: list[list[Descriptor]] = field(default_factory=list)
    """By height: none of them names one of its own list or of a later one. The target isn't among them."""
    absent: list[Descriptor] = field(default_factory=list)
    """Manifests that aren't on this node: the registry must have them already."""


class Planner:
    """Reads the tree of one image."""

    def __init__(self, store: Store, namespace: str, name: str) -> None:
        self._store, self._namespace, self._name = store, namespace, name

    async def plan(self, target: Descriptor, platform: str, *, all_platforms: bool) -> Plan:
        """The plan for a target, or for the manifest of one platform of it.

        NOT_FOUND for what isn't here, or isn't offered; FAILED_PRECONDITION for what makes no sense.
        """
        if not all_platforms:
            target = self._choose(target, platform)
        plan = Plan(target)
        seen: dict[str, int] = {}
        await self._visit(plan, target, seen, 0)
        return plan

    def data(self, descriptor: Descriptor) -> bytes:
        """A manifest's bytes, verified: a registry would take any for what a tag is to name."""
        if descriptor.size > media.MAX_MANIFEST_BYTES:
            raise FailedPrecondition(f"image {self._name}: {descriptor.digest} is too large for what it should be")
        data = self._store.open(self._namespace, descriptor.digest)
        digest = digest_of(data, descriptor.digest.partition(":")[0])
        if digest != descriptor.digest or len(data) != descriptor.size:
            raise DataLoss(
                f"image {self._name}: {descriptor.digest} of {descriptor.size} bytes is damaged on this node",
                hint="pull the image again",
            )
        return data

    def _choose(self, target: Descriptor, platform: str) -> Descriptor:
        if target.media_type in media.INDEXES:
            return choose_manifest(self._name, media.read_index(self._manifest(target)), platform)
        if platform and target.media_type in media.MANIFESTS:
            manifest = media.read_manifest(self._manifest(target))
            config = media.read_config(self._store.open(self._namespace, manifest.config.digest))
            check(self._name, manifest, config, platform)
        return target

    async def _visit(self, plan: Plan, descriptor: Descriptor, seen: dict[str, int], depth: int) -> int:
        """Takes a manifest and what it names into the plan; returns its height."""
        if depth > _DEEPEST:
            raise FailedPrecondition(f"image {self._name}: indexes in indexes, more than {_DEEPEST} of them")
        if descriptor.digest in seen:
            return seen[descriptor.digest]
        height = 0
        if depth and not self._store.sees(self._namespace, descriptor.digest):
            plan.absent.append(descriptor)
            seen[descriptor.digest] = 0
            return 0
        data = self._manifest(descriptor)
        await asyncio.sleep(0)  # there may be many
        for child in media.children(descriptor.media_type, data):
            if descriptor.media_type in media.INDEXES:
                height = max(height, 1 + await self._visit(plan, child, seen, depth + 1))
            elif child.digest not in seen:
                seen[child.digest] = 0
                skip = any(part in child.media_type for part in _NOT_TO_BE_HANDED_ON)
                (plan.skipped if skip else plan.blobs).append(child)
            if len(seen) > _MOST:
                raise FailedPrecondition(f"image {self._name}: more than {_MOST} blobs")
        seen[descriptor.digest] = height
        if depth:
            while len(plan.manifests) <= height:
                plan.manifests.append([])
            plan.manifests[height].append(descriptor)
        return height

    def _manifest(self, descriptor: Descriptor) -> bytes:
        try:
            return self.data(descriptor)
        except NotFound:
            raise NotFound(
                f"image {self._name}: {descriptor.digest} isn't on this node", hint="pull it first"
            ) from None
