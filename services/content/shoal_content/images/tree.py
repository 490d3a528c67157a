"""An image's tree: from its target over an index and a manifest to configuration and layers, as far as it is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal_bus.errors import FailedPrecondition, NotFound
from shoal_bus.types import Descriptor, Platform

from shoal_content import media
from shoal_content.blobs.store import Store
from shoal_content.images import platforms
from shoal_content.media import Config, Manifest


@dataclass(frozen=True)
class Choice:
    """The image of one platform: its manifest's descriptor, and what that and its configuration say."""

    descriptor: Descriptor
    manifest: Manifest
    config: Config


class Trees:
    """Reads the trees of images from the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reachable(self, target: Descriptor) -> Iterator[str]:
        """The digests of all blobs that a target leads to, itself first, also of those that aren't here.

        What a document leads to is what it says itself, whatever media type a descriptor claims for it.
        """
        seen: set[str] = set()
        pending = [target.digest]
        while pending:
            digest = pending.pop()
            if digest not in seen:
                seen.add(digest)
                yield digest
                pending += self._store.references(digest)

    def choose(self, namespace: str, name: str, target: Descriptor, platform: str) -> Choice:
        """The image of one platform. NOT_FOUND when it isn't offered, or isn't on this node."""
        data = self._open(namespace, name, target)
        kind = media.kind_of(data, target.media_type)
        descriptor = target
        if kind in media.INDEXES:
            descriptor = choose_manifest(name, media.read_index(data), platform)
            data = self._open(namespace, name, descriptor)
        manifest = media.read_manifest(data)
        config = media.read_config(self._open(namespace, name, manifest.config))
        check(name, manifest, config, platform)
        return Choice(descriptor, manifest, config)

    def _open(self, namespace: str, name: str, descriptor: Descriptor) -> bytes:
        if not self._store.sees(namespace, descriptor.digest):
            which = f" for {descriptor.platform}" if descriptor.platform else ""
            flag = f" --platform {descriptor.platform}" if descriptor.platform else ""
            raise NotFound(
                f"image {name}: {descriptor.digest}{which} isn't on this node", hint=f"pull it{flag}".rstrip()
            )
        if descriptor.size > media.MAX_MANIFEST_BYTES:
            raise FailedPrecondition(f"image {name}: {descriptor.digest} is too large for what it should be")
        return self._store.open(namespace, descriptor.digest)


def choose_manifest(name: str, offered: list[Descriptor], platform: str) -> Descriptor:
    """The manifest of an index for a platform; NOT_FOUND names what there is."""
    wanted = platforms.wanted(platform)
    at = platforms.best(wanted, [one.platform for one in offered])
    if at is None and len(offered) == 1 and offered[0].platform is None:
        at = 0  # its configuration will tell
    if at is None:
        raise _no_platform(name, wanted[0], [one.platform for one in offered if one.platform is not None])
    return offered[at]


def check(name: str, manifest: Manifest, config: Config, platform: str) -> None:
    """Whether a manifest and its configuration fit one another, and the platform."""
    if len(manifest.layers) != len(config.diff_ids):
        raise FailedPrecondition(
            f"image {name}: its manifest has {len(manifest.layers)} layers, its configuration {len(config.diff_ids)}"
        )
    wanted = platforms.wanted(platform)
    # Older builders left the variant out of the configuration.
    plain = [Platform(os=one.os, architecture=one.architecture) for one in wanted]
    if config.platform is not None and platforms.best([*wanted, *plain], [config.platform]) is None:
        raise _no_platform(name, wanted[0], [config.platform])


def _no_platform(name: str, wanted: Platform, offered: list[Platform]) -> NotFound:
    there = ", ".join(sorted({str(platforms.normalise(one)) for one in offered})[:20]) or "none"
    return NotFound(f"image {name}: has nothing for {wanted}", hint=f"it offers {there}")
