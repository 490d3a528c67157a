"""An archive that was taken apart, read: which images are in it, and where their blobs are.

Three formats are known by what they hold: an OCI image layout (`oci-layout`, `index.json`; image-spec,
image-layout.md), what `docker save` writes (`manifest.json`), and what it wrote before Docker 1.10 (`repositories`).
One that is several of them is read as the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_bus import image_reference as reference
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.archives.work.compression import HEAD, compression_of
from shoal_content.archives.work.errors import WorkError, shown
from shoal_content.archives.work.load import TABLE
from shoal_content.archives.work.tar import clean
from shoal_content.blobs.layout import digest_of
from shoal_content.images import platforms

CONTAINERD_NAME, REF_NAME = "io.containerd.image.name", "org.opencontainers.image.ref.name"
MAX_DOCUMENTS_BYTES = 32 << 20
"""Of all documents that have to be parsed to know what is in an archive."""
_MOST_LINKS = 16
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"


@dataclass(frozen=True)
class Member:
    """A file of the archive: where it lies now, and what it is."""

    path: Path
    digest: str
    size: int
    uncompressed: str = ""
    """Its digest before it was compressed here."""


@dataclass
class Found:
    """An image of an archive, with its names as they are there: whole references, or tags alone."""

    target: Descriptor
    names: list[str] = field(default_factory=list)


class Archive:
    """What one archive holds, checked when it is asked for: FAILED_PRECONDITION says what is wrong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        table = json.loads((directory / TABLE).read_text())
        self._members = {
            name: Member(directory / one["file"], one["digest"], one["size"]) for name, one in table["members"].items()
        }
        self._links: dict[str, str] = table["links"]
        self._by_digest = {member.digest: member for member in self._members.values()}
        self._compressed: dict[str, Member] = {}
        self._read = 0

    # ---------------------------------------------------------------------------------------------------------- blobs

    def member(self, digest: str) -> Member | None:
        """Where a blob is, if it is in the archive."""
        return self._by_digest.get(digest)

    def size(self, digest: str) -> int | None:
        """A blob's size, or None where it isn't there."""
        member = self._by_digest.get(digest)
        return member.size if member is not None else None

    def open(self, digest: str) -> bytes:
        """All of a small blob that is there."""
        return self._by_digest[digest].path.read_bytes()

    # --------------------------------------------------------------------------------------------------------- images

    def images(self) -> list[Found]:
        """The images in it, each once, in the archive's order."""
        if self._find("oci-layout") is not None:
            return _one_of_each_name(self._of_layout())
        if self._find("manifest.json") is not None:
            return _one_of_each_name(self._of_docker())
        if self._find("repositories") is not None:
            return _one_of_each_name(self._of_old_docker())
        raise FailedPrecondition(
            "the archive holds no images", hint="OCI image layouts and what `docker save` writes can be read"
        )

    def index(self) -> tuple[Descriptor, list[Descriptor]]:
        """The archive's index, and what is in it: a layout's own, or one of Docker's images by all their names."""
        if self._find("oci-layout") is not None:
            self._check_layout()
            member = self._named("index.json")
            entries = media.read_entries(self._document(member, "index.json"))
            return Descriptor(media_type=media.OCI_INDEX, digest=member.digest, size=member.size), entries
        entries = [entry for one in self.images() for entry in self._entries(one)]
        document = {
            "schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": [media.as_json(entry) for entry in entries],
        }  # fmt: skip
        return self._made(media.OCI_INDEX, document), entries

    def plain_layers(self) -> list[Member]:
        """The layers without compression of an archive that isn't a layout, each once."""
        if self._find("oci-layout") is not None:
            return []
        found: dict[str, Member] = {}
        for image in self.images():
            for layer in media.parts(self.open(image.target.digest))[1:]:
                if layer.media_type == media.DOCKER_LAYER:
                    found[layer.digest] = self._by_digest[layer.digest]
        self._read = 0  # they are read again, as they are then
        return list(found.values())

    def replace(self, layer: Member, path: Path, digest: str, size: int) -> None:
        """Has a plain layer be stored as what it was compressed to."""
        self._compressed[layer.digest] = self._by_digest[digest] = Member(path, digest, size, layer.digest)

    def _entries(self, image: Found) -> list[Descriptor]:
        """An image as an index has it: once for each of its names, which it has in both their forms."""
        config = media.parts(self.open(image.target.digest))[0]
        platform = media.read_config(self.open(config.digest)).platform
        target = image.target.model_copy(update={"platform": platform})
        if not image.names:
            return [target]
        found = []
        for name in image.names:
            try:
                parsed = reference.parse(name)
            except InvalidArgument as error:
                raise FailedPrecondition(f"the archive has an image of a name that can't be: {error.message}") from None
            annotations = {CONTAINERD_NAME: str(parsed), REF_NAME: parsed.tag or str(parsed)}
            found.append(target.model_copy(update={"annotations": annotations}))
        return found

    def _check_layout(self) -> None:
        version = self._json("oci-layout", dict).get("imageLayoutVersion")
        if not str(version).startswith("1."):
            raise FailedPrecondition(
                f"the archive is an OCI layout of version {str(version)[:20]!r}, which isn't known"
            )

    def _of_layout(self) -> list[Found]:
        self._check_layout()
        found: dict[str, Found] = {}
        for entry in media.read_entries(self._document(self._named("index.json"), "index.json")):
            one = found.setdefault(entry.digest, Found(entry.model_copy(update={"annotations": {}})))
            name = _name(entry.annotations.get(CONTAINERD_NAME, ""), entry.annotations.get(REF_NAME, ""))
            if name and name not in one.names:
                one.names.append(name)
        return list(found.values())

    def _of_docker(self) -> list[Found]:
        found: dict[str, Found] = {}
        for entry in self._json("manifest.json", list):
            if not isinstance(entry, dict):
                raise FailedPrecondition("the archive's manifest.json has an entry that isn't an object")
            layers, tags = entry.get("Layers") or [], entry.get("RepoTags") or []
            if not isinstance(layers, list) or not isinstance(tags, list) or len(layers) > media.MAX_LAYERS:
                raise FailedPrecondition("the archive's manifest.json has an entry that isn't an image's")
            config = self._named(entry.get("Config"))
            target = self._manifest(config, [self._named(layer) for layer in layers])
            one = found.setdefault(target.digest, Found(target))
            one.names += [tag for tag in map(str, tags) if tag not in one.names]
        return list(found.values())

    def _manifest(self, config: Member, layers: list[Member]) -> Descriptor:
        """The manifest of an image that has none: its own, made of what the archive holds."""
        diff_ids = media.read_config(self._document(config, f"configuration {config.digest}")).diff_ids
        if len(diff_ids) != len(layers):
            raise FailedPrecondition(
                f"the archive has {len(layers)} layers for a configuration of {len(diff_ids)}: {config.digest}"
            )
        described = []
        for layer, diff_id in zip(layers, diff_ids, strict=True):
            with layer.path.open("rb") as file:
                kind = compression_of(file.read(HEAD))
            of_one_kind = diff_id.partition(":")[0] == layer.digest.partition(":")[0]
            if kind == "none" and of_one_kind and layer.digest != diff_id:
                raise FailedPrecondition(
                    f"the archive's layer {layer.digest} isn't the one that its configuration says, {diff_id}"
                )
            compressed = self._compressed.get(layer.digest)
            if compressed is not None:
                layer, kind = compressed, "gzip"  # noqa: PLW2901 (what it is stored as)
            suffix = "" if kind == "none" else f".{kind}"
            described.append({"mediaType": f"{media.DOCKER_LAYER}{suffix}", "digest": layer.digest, "size": layer.size})
        document = {
            "schemaVersion": 2,
            "mediaType": media.DOCKER_MANIFEST,
            "config": {"mediaType": _DOCKER_CONFIG, "digest": config.digest, "size": config.size},
            "layers": described,
        }
        return self._made(media.DOCKER_MANIFEST, document)

    def _of_old_docker(self) -> list[Found]:
        found: dict[str, Found] = {}
        for repository, tags in self._json("repositories", dict).items():
            if not isinstance(tags, dict):
                raise FailedPrecondition("the archive's repositories isn't a map of tags")
            for tag, id in tags.items():
                target = self._of_old_image(str(id))
                found.setdefault(target.digest, Found(target)).names.append(f"{repository}:{tag}")
        return list(found.values())

    def _of_old_image(self, id: str) -> Descriptor:
        """An image of Docker's first kind: a chain of directories, each with its layer and what was run to make it."""
        chain: list[dict[str, Any]] = []
        layers: list[Member] = []
        while id:
            if len(chain) == media.MAX_LAYERS:
                raise FailedPrecondition(f"the archive's image {shown(id)!r} has too many parents, or goes in a circle")
            image = self._json(f"{id}/json", dict)
            layer = self._named(f"{id}/layer.tar")
            with layer.path.open("rb") as file:
                if compression_of(file.read(HEAD)) != "none" or not layer.digest.startswith("sha256:"):
                    raise FailedPrecondition(f"the archive's layer {shown(id)!r} isn't a plain tar archive")
            chain.append(image)
            layers.append(layer)
            id = str(image.get("parent") or "")
        top = {key: value for key, value in chain[0].items() if key not in ("id", "parent", "layer_id", "Size")}
        history = [_history(image) for image in reversed(chain)]
        layers.reverse()
        config = top | {
            "history": history,
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
        made = self._made(_DOCKER_CONFIG, config)
        return self._manifest(self._by_digest[made.digest], layers)

    # --------------------------------------------------------------------------------------------------------- within

    def _made(self, media_type: str, document: dict[str, Any]) -> Descriptor:
        """A document of ours that becomes one of the archive's blobs."""
        data = json.dumps(document, separators=(",", ":")).encode()
        digest = digest_of(data)
        if digest not in self._by_digest:
            path = self._directory / f"made-{len(self._by_digest)}"
            path.write_bytes(data)
            self._by_digest[digest] = Member(path, digest, len(data))
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    def _find(self, name: str) -> Member | None:
        for _ in range(_MOST_LINKS):
            if name not in self._links:
                return self._members.get(name)
            name = self._links[name]
        raise FailedPrecondition(f"archive member {shown(name)!r}: too many links")

    def _named(self, name: Any) -> Member:
        """The member that a document names."""
        try:
            member = self._find(clean(name.encode("utf-8", "surrogateescape"))) if isinstance(name, str) else None
        except WorkError as error:
            raise FailedPrecondition(error.message) from None
        if member is None:
            raise FailedPrecondition(f"the archive names {shown(str(name))!r}, which isn't in it")
        return member

    def _document(self, member: Member, what: str) -> bytes:
        self._read += member.size
        if member.size > media.MAX_MANIFEST_BYTES or self._read > MAX_DOCUMENTS_BYTES:
            raise FailedPrecondition(f"{what}: {member.size} bytes are too many, on top of {self._read - member.size}")
        return member.path.read_bytes()

    def _json(self, name: str, kind: type[Any]) -> Any:
        try:
            found = json.loads(self._document(self._named(name), f"archive member {shown(name)!r}"))
        except (ValueError, RecursionError):
            raise FailedPrecondition(f"archive member {shown(name)!r}: isn't JSON") from None
        if not isinstance(found, kind):
            raise FailedPrecondition(f"archive member {shown(name)!r}: isn't what it should be")
        return found


def _name(whole: str, tag: str) -> str:
    """The name of two annotations. Tools that know the tag alone change that, and leave the whole name."""
    repository, colon, old = whole.rpartition(":")
    if colon and tag and tag != old and not any(sign in old + tag for sign in "/:@"):
        return f"{repository}:{tag}"
    return whole or tag


def _history(image: dict[str, Any]) -> dict[str, Any]:
    """What an old image says of how it was made, as a configuration has it (config.md, history)."""
    made_by = image.get("container_config")
    command = made_by.get("Cmd") if isinstance(made_by, dict) else None
    told = {
        "created": image.get("created"),
        "created_by": " ".join(map(str, command)) if isinstance(command, list) else "",
        "author": image.get("author"),
        "comment": image.get("comment"),
    }
    return {key: value for key, value in told.items() if value}


def _one_of_each_name(found: list[Found]) -> list[Found]:
    """Some tools name one image for each platform, without an index over them: the name is the best one's here."""
    named: dict[str, list[Found]] = {}
    for one in found:
        for name in one.names:
            named.setdefault(name, []).append(one)
    for name, several in named.items():
        if len(several) > 1:
            at = platforms.best(platforms.wanted(""), [one.target.platform for one in several])
            if at is None:
                raise FailedPrecondition(f"the archive has several images of the name {shown(name)!r}")
            for one in several:
                if one is not several[at]:
                    one.names.remove(name)
    return found
