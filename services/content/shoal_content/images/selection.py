"""Which blobs of an image are meant when it is to be copied: for one platform, or for all, from wherever they are.

    selection = select(StoreSource(store, namespace), name, target, platform="", all_platforms=False)
    selection.blobs, selection.image

Of an index, the manifests that are asked for must be there with all they lead to; attestations come along with what
they attest where they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shoal_bus.errors import FailedPrecondition, NotFound
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.images import platforms
from shoal_content.images.source import Documents, Source
from shoal_content.images.tree import choose_manifest
from shoal_content.media import Config, Manifest

_DEEPEST = 4


@dataclass(frozen=True)
class Picked:
    """One manifest: an image's with its configuration, or another one's (`config` is None)."""

    descriptor: Descriptor
    data: bytes
    manifest: Manifest | None = None
    config: Config | None = None


@dataclass
class Selection:
    """What was asked for. `blobs` by digest; `image` is what this node would unpack, if it is among them."""

    target: Descriptor
    blobs: dict[str, Descriptor] = field(default_factory=dict)
    manifests: list[Picked] = field(default_factory=list)
    image: Picked | None = None
    whole: bool = True
    """Whether it is all of the target: of an index, all of its images."""


def select(
    source: Source,
    name: str,
    target: Descriptor,
    *,
    platform: str,
    all_platforms: bool,
    only: Sequence[str] = (),
    unpackable: bool = True,
    skip_non_distributable: bool = False,
) -> Selection:
    """What of an image is meant. NOT_FOUND names the first blob that isn't there, FAILED_PRECONDITION what is wrong.

    `only` are platforms of which all are meant, instead of the best one for `platform`. Without `unpackable`, it is no
    error that an image's configuration doesn't go with its layers: it is copied as it is.
    """
    return _Selecting(source, name, skip_non_distributable, unpackable).run(target, platform, all_platforms, only)


class _Selecting:
    def __init__(self, source: Source, name: str, skip_non_distributable: bool, unpackable: bool) -> None:
        self._documents, self._name = Documents(source, f"image {name}"), name
        self._skip, self._unpackable = skip_non_distributable, unpackable

    def run(self, target: Descriptor, platform: str, all_platforms: bool, only: Sequence[str]) -> Selection:
        found = Selection(target)
        data = self._documents.read(target)
        if media.kind_of(data, target.media_type) not in media.INDEXES:
            found.image = self._pick(found, target, data)
            if found.image.config is None:
                found.image = None
            return found
        entries = self._entries(found, target, data, 0)
        images = [entry for entry in entries if not media.is_attestation(entry)]
        if all_platforms:
            wanted = images
        elif only:
            wanted = self._exactly(images, only)
        else:
            wanted = [choose_manifest(self._name, images, platform)]
        found.whole = len(wanted) == len(images)
        for entry in wanted:
            self._pick(found, entry, self._documents.read(entry))
        digests = {entry.digest for entry in wanted}
        for entry in entries:
            if media.is_attestation(entry) and (all_platforms or entry.annotations.get(media.ATTESTED) in digests):
                self._pick_if_there(found, entry)
        picked = [one for one in found.manifests if one.config is not None and one.descriptor.digest in digests]
        for text in only or [platform] if picked else []:
            with suppress(NotFound):
                own = choose_manifest(self._name, [one.descriptor for one in picked], text)
                found.image = next(one for one in picked if one.descriptor is own)
                break
        return found

    def _exactly(self, images: list[Descriptor], only: Sequence[str]) -> list[Descriptor]:
        asked = [platforms.parse(text) for text in only]
        found = [one for one in images if one.platform is None or platforms.same(one.platform, *asked)]
        if not found:
            raise NotFound(f"image {self._name}: has nothing for {' or '.join(map(str, asked))}")
        return found

    def _entries(self, found: Selection, index: Descriptor, data: bytes, depth: int) -> list[Descriptor]:
        """The entries of an index, those of indexes in it included; the indexes themselves are selected."""
        found.blobs[index.digest] = index
        entries: list[Descriptor] = []
        for entry in media.read_entries(data):
            if entry.media_type not in media.INDEXES:
                entries.append(entry)
            elif self._documents.has(entry) and entry.digest not in found.blobs:
                if depth == _DEEPEST:
                    raise FailedPrecondition(f"image {self._name}: indexes in indexes, {_DEEPEST} deep")
                entries += self._entries(found, entry, self._documents.read(entry), depth + 1)
            if len(entries) > media.MAX_MANIFESTS:
                raise FailedPrecondition(f"image {self._name}: more than {media.MAX_MANIFESTS} manifests")
        return entries

    def _pick(self, found: Selection, entry: Descriptor, data: bytes) -> Picked:
        if media.kind_of(data, entry.media_type) not in media.MANIFESTS:
            raise FailedPrecondition(f"image {self._name}: {entry.digest} is no manifest")
        picked = Picked(entry, data)
        if not media.is_artifact(data) and not media.is_attestation(entry):
            manifest = media.read_manifest(data)
            config = media.read_config(self._documents.read(manifest.config))
            fits = len(manifest.layers) == len(config.diff_ids)
            if not fits and self._unpackable:
                raise FailedPrecondition(
                    f"image {self._name}: its manifest has {len(manifest.layers)} layers,"
                    f" its configuration {len(config.diff_ids)}"
                )
            if fits:
                picked = Picked(entry, data, manifest, config)
        for child in media.parts(data):
            if self._skip and child.media_type in media.NON_DISTRIBUTABLE:
                continue
            self._documents.require(child)
            found.blobs[child.digest] = child
        found.blobs[entry.digest] = entry
        found.manifests.append(picked)
        return picked

    def _pick_if_there(self, found: Selection, entry: Descriptor) -> None:
        if not self._documents.has(entry):
            return
        data = self._documents.read(entry)
        children = media.parts(data)
        if all(self._documents.has(child) for child in children):
            self._pick(found, entry, data)
