"""What an import takes of an archive: which blobs, what is unpacked to where, and which images are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal_bus import image_reference as reference
from shoal_bus.api.content import ImportImages, StoreArchive
from shoal_bus.errors import FailedPrecondition, NotFound
from shoal_bus.types import Descriptor, Platform

from shoal_content import media
from shoal_content.archives.archive import Archive, Found
from shoal_content.archives.naming import Names, Stored, stored
from shoal_content.images import platforms
from shoal_content.images.selection import select
from shoal_content.images.source import Documents, Source

_DEEPEST = 8


@dataclass(frozen=True)
class Unpacking:
    """An image's layers, and where they go to."""

    name: str
    snapshotter: str
    layers: list[Descriptor]
    diff_ids: list[str]


@dataclass
class Plan:
    """What an import does. `blobs` by digest."""

    blobs: dict[str, Descriptor] = field(default_factory=dict)
    unpacks: list[Unpacking] = field(default_factory=list)
    images: list[Stored] = field(default_factory=list)


class Planning:
    """The rules of one request; INVALID_ARGUMENT for one that can't be, before an archive is read."""

    def __init__(self, request: ImportImages) -> None:
        platforms.wanted(request.platform)
        self._request, self._store = request, request.store
        for text in (
            [*request.store.platforms, *(one.platform for one in request.store.unpacks)] if request.store else []
        ):
            platforms.wanted(text)
        base = reference.parse(request.base_name) if request.base_name else None
        self._names = Names(base, digests=request.digests, date=time.strftime("%Y-%m-%d", time.gmtime()))

    @property
    def snapshotters(self) -> list[str]:
        """Where anything is unpacked to."""
        return [one.snapshotter for one in self._store.unpacks] if self._store else [self._request.snapshotter]

    def read(self, archive: Archive) -> Callable[[Source], Plan]:
        """What is in an archive; what of it is wanted can be asked then: what it leaves out may be in that source.

        Both raise FAILED_PRECONDITION, and the latter NOT_FOUND. It goes to the database, and this to the disk alone.
        """
        if self._store is None:
            found = archive.images()
            return lambda store: self._load(found, _Both(archive, store))
        index, entries, store_rules = *archive.index(), self._store
        return lambda store: _Storing(self._request, store_rules, _Both(archive, store)).plan(index, entries)

    def _load(self, found: list[Found], source: Source) -> Plan:
        request, plan = self._request, Plan()
        for target, names in self._names.of(found).values():
            selection = select(source, names[0], target, platform=request.platform, all_platforms=request.all_platforms)
            plan.blobs |= selection.blobs
            plan.images += [Stored(name, target, request.labels) for name in names]
            image = selection.image
            if image is not None and image.manifest is not None and image.config is not None and request.snapshotter:
                plan.unpacks.append(
                    Unpacking(names[0], request.snapshotter, image.manifest.layers, image.config.diff_ids)
                )
        return plan


class _Storing:
    """What containerd's image store takes of an archive (core/transfer/local: `importStream`).

    It goes from the archive's index down, past what isn't for one of the platforms. An image of another one that is
    called something is stored by its manifest alone.
    """

    def __init__(self, request: ImportImages, store: StoreArchive, source: Source) -> None:
        self._request, self._store, self._documents = request, store, Documents(source, "the archive")
        self._platforms = [platforms.parse(text) for text in store.platforms]
        self._led: dict[str, list[Descriptor]] = {}
        """What is taken of what each document leads to."""
        self._manifests: dict[str, tuple[Descriptor, bytes]] = {}
        """Those whose layers are taken."""

    def plan(self, index: Descriptor, entries: list[Descriptor]) -> Plan:
        self._walk(index, 0)
        if not self._manifests:
            which = ", ".join(self._store.platforms) or "any platform"
            raise NotFound(f"the archive has nothing for {which}")
        plan = Plan(images=stored(self._store, index, entries, self._request.labels))
        for image in plan.images:
            self._add(plan, image.target)
        names: dict[str, str] = {}
        for image in plan.images:
            self._name(names, image.target, image.name)
        for wanted in self._store.unpacks:
            matching = platforms.wanted(wanted.platform)
            for digest, (manifest, data) in self._manifests.items():
                if digest in plan.blobs:
                    plan.unpacks += self._unpacking(names[digest], wanted.snapshotter, matching, manifest, data)
        return plan

    def _walk(self, descriptor: Descriptor, depth: int) -> None:
        if descriptor.digest in self._led:
            return
        if depth == _DEEPEST:
            raise FailedPrecondition(f"the archive has indexes in indexes, {_DEEPEST} deep")
        data = self._documents.read(descriptor)
        kind = media.kind_of(data, descriptor.media_type)
        if kind in media.INDEXES:
            led = self._limited(
                [one for one in media.read_entries(data) if self._store.all_metadata or self._wants(one)]
            )
            self._led[descriptor.digest] = led
            for one in led:
                if one.media_type in media.INDEXES | media.MANIFESTS:
                    self._walk(one, depth + 1)
            return
        parts = media.parts(data)
        if self._wants(descriptor):
            self._manifests[descriptor.digest] = descriptor, data
        else:
            parts = [one for one in parts if one.media_type in media.CONFIGS]
        # A layer that may not be distributed isn't in an archive: whoever unpacks it fetches it.
        self._led[descriptor.digest] = [
            one for one in parts if one.media_type not in media.NON_DISTRIBUTABLE or self._documents.has(one)
        ]

    def _wants(self, descriptor: Descriptor) -> bool:
        return not self._platforms or descriptor.platform is None or self._rank(descriptor) < len(self._platforms)

    def _rank(self, descriptor: Descriptor) -> int:
        """Which of the platforms it is for; as many as there are for another one, or none."""
        told = descriptor.platform
        ranks = (at for at, one in enumerate(self._platforms) if told is not None and platforms.same(told, one))
        return next(ranks, len(self._platforms))

    def _limited(self, led: list[Descriptor]) -> list[Descriptor]:
        limit = self._store.manifest_limit
        return sorted(led, key=self._rank)[:limit] if limit else led

    def _add(self, plan: Plan, target: Descriptor) -> None:
        """An image's blobs. NOT_FOUND for one that isn't anywhere."""
        if target.digest not in plan.blobs:
            self._documents.require(target)
            plan.blobs[target.digest] = target
            for one in self._led.get(target.digest, []):
                self._add(plan, one)

    def _name(self, names: dict[str, str], target: Descriptor, name: str) -> None:
        """Notes which image a blob is of, for messages: the first one that leads to it."""
        if target.digest not in names:
            names[target.digest] = name
            for one in self._led.get(target.digest, []):
                self._name(names, one, name)

    def _unpacking(
        self, name: str, snapshotter: str, wanted: list[Platform], manifest: Descriptor, data: bytes
    ) -> list[Unpacking]:
        if media.is_artifact(data) or media.is_attestation(manifest):
            return []
        read = media.read_manifest(data)
        config = media.read_config(self._documents.read(read.config))
        platform = manifest.platform or config.platform
        if platform is not None and platforms.best(wanted, [platform]) is None:
            return []
        if len(read.layers) != len(config.diff_ids):
            raise FailedPrecondition(
                f"image {name}: its manifest has {len(read.layers)} layers, its configuration {len(config.diff_ids)}"
            )
        return [Unpacking(name, snapshotter, read.layers, config.diff_ids)]


class _Both:
    """An archive's blobs, and those that the namespace sees already: an archive may have what is new alone."""

    def __init__(self, archive: Archive, store: Source) -> None:
        self._archive, self._store = archive, store

    def size(self, digest: str) -> int | None:
        size = self._archive.size(digest)
        return size if size is not None else self._store.size(digest)

    def open(self, digest: str) -> bytes:
        return self._archive.open(digest) if self._archive.member(digest) is not None else self._store.open(digest)
