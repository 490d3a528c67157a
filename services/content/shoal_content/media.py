"""Manifests, indexes and configurations: OCI's media types and Docker's schema 2, read with suspicion.

OCI image-spec: manifest.md, image-index.md, config.md. Everything here came from a registry: it is bounded in size and
number, and what isn't of its shape is FAILED_PRECONDITION.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Descriptor, Platform, check_digest, is_digest

OCI_INDEX, OCI_MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES, MANIFESTS = frozenset({OCI_INDEX, DOCKER_LIST}), frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"})
OCI_LAYER, DOCKER_LAYER = "application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"
NON_DISTRIBUTABLE = frozenset(
    f"{base}{compression}"
    for base, compressions in (
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", ("", "+gzip", "+zstd")),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", ("", ".gzip", ".zstd")),
    )
    for compression in compressions
)
"""Layers that their makers forbid to pass on: fetched from elsewhere, unpacked as any other."""
LAYERS = NON_DISTRIBUTABLE | frozenset(
    f"{base}{compression}"
    for base, compressions in ((OCI_LAYER, ("", "+gzip", "+zstd")), (DOCKER_LAYER, ("", ".gzip", ".zstd")))
    for compression in compressions
)
OTHER_LAYERS = "application/vnd.oci.image.layer.v1.tar+"
"""Layers compressed otherwise: whether they can be unpacked is the snapshot service's to say (stream processors)."""
ATTESTED = "vnd.docker.reference.digest"
"""The annotation of a manifest that is about another one of the same index, whose digest it is."""
MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 512
MAX_MANIFESTS = 1024
MAX_REFERENCES = 4096


@dataclass(frozen=True)
class Manifest:
    """An image manifest: its configuration, and its layers, bottom first."""

    config: Descriptor
    layers: list[Descriptor]


@dataclass(frozen=True)
class Config:
    """What of an image configuration the content service reads; `json` is all of it."""

    platform: Platform | None
    diff_ids: list[str]
    json: dict[str, Any]


def kind_of(data: bytes, media_type: str) -> str:
    """The media type of a manifest: what it says of itself, or else what it was served as (`media_type`)."""
    document = _load(data, "manifest")
    _check_kind(document)
    if (
        document.get("schemaVersion") == 1
        or "prettyjws" in media_type
        or media_type.endswith("manifest.v1+json+docker")
    ):
        raise FailedPrecondition(
            "the image is of Docker's schema 1, which nobody pushes any more", hint="push it again with a newer tool"
        )
    said = document.get("mediaType") or media_type.partition(";")[0].strip()
    if not isinstance(said, str):
        raise FailedPrecondition("the manifest's mediaType isn't text")
    if said in INDEXES | MANIFESTS:
        return said
    if not document.get("mediaType"):  # OCI made it optional; the shape tells
        if isinstance(document.get("manifests"), list):
            return OCI_INDEX
        if isinstance(document.get("layers"), list) and isinstance(document.get("config"), dict):
            return OCI_MANIFEST
    raise FailedPrecondition(f"media type {said[:100]!r} isn't an image's", hint="it may be another kind of artifact")


def read_index(data: bytes) -> list[Descriptor]:
    """The manifests of an index; attestations, which aren't images, are left out."""
    return [one for one in read_entries(data) if not is_attestation(one)]


def read_entries(data: bytes) -> list[Descriptor]:
    """The manifests of an index, whatever they are."""
    document = _load(data, "index")
    _check_kind(document)
    return [_descriptor(entry) for entry in _list(document, "manifests", MAX_MANIFESTS)]


def is_attestation(entry: Descriptor) -> bool:
    """Whether an index's entry is about another one of it: of no platform, as BuildKit writes them."""
    return ATTESTED in entry.annotations or (entry.platform is not None and entry.platform.os == "unknown")


def is_artifact(data: bytes) -> bool:
    """Whether a manifest is of something else than an image: its configuration is no image's (manifest.md, guidelines
    for artifact usage). Such a one is stored, and never unpacked."""
    document = _load(data, "manifest")
    config = _descriptor(document.get("config"))
    return config.media_type not in CONFIGS or bool(document.get("artifactType"))


def read_manifest(data: bytes) -> Manifest:
    """A manifest whose configuration and layers are of types that can be unpacked."""
    document = _load(data, "manifest")
    _check_kind(document)
    config = _descriptor(document.get("config"))
    layers = [_descriptor(entry) for entry in _list(document, "layers", MAX_LAYERS)]
    if config.media_type not in CONFIGS:
        raise FailedPrecondition(f"media type {config.media_type[:100]!r}: not an image's configuration")
    for layer in layers:
        if layer.media_type not in LAYERS and not layer.media_type.startswith(OTHER_LAYERS):
            raise FailedPrecondition(f"layer {layer.digest}: media type {layer.media_type[:100]!r} can't be unpacked")
    for one in (config,):
        if one.size > MAX_MANIFEST_BYTES:
            raise FailedPrecondition(f"configuration {one.digest}: {one.size} bytes, more than {MAX_MANIFEST_BYTES}")
    return Manifest(config, layers)


def read_config(data: bytes) -> Config:
    """An image configuration."""
    document = _load(data, "configuration")
    rootfs = document.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else []
    if not isinstance(diff_ids, list) or len(diff_ids) > MAX_LAYERS:
        raise FailedPrecondition("the configuration's rootfs.diff_ids isn't a list of layers")
    try:
        checked = [check_digest(str(one)) for one in diff_ids]
    except ValueError as error:
        raise FailedPrecondition(f"the configuration's rootfs.diff_ids: {error}") from None
    return Config(_platform(document), checked, document)


def children(media_type: str, data: bytes) -> list[Descriptor]:
    """What a document of this kind leads to: an index its manifests, a manifest its configuration and layers."""
    if media_type in INDEXES:
        return [_descriptor(one) for one in _list(_load(data, "index"), "manifests", MAX_MANIFESTS)]
    if media_type in MANIFESTS:
        document = _load(data, "manifest")
        layers = [_descriptor(one) for one in _list(document, "layers", MAX_LAYERS)]
        return [_descriptor(document.get("config")), *layers]
    return []


def references(data: bytes) -> list[str]:
    """The digests of what a document leads to: manifests, configuration and layers, as far as they are legible.

    Whoever decides by this what is kept doesn't care whether the document is a good one: that is seen when it is used.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if not isinstance(document, dict):
        return []
    found = [document.get("config")]
    for key in ("manifests", "layers"):
        value = document.get(key)
        found += value[:MAX_REFERENCES] if isinstance(value, list) else []
    digests = [one.get("digest") for one in found if isinstance(one, dict)]
    return list(dict.fromkeys(one for one in digests if isinstance(one, str) and is_digest(one)))


def entries(data: bytes) -> list[dict[str, Any]]:
    """The entries of an index as it has them."""
    found = _list(_load(data, "index"), "manifests", MAX_MANIFESTS)
    if not all(isinstance(entry, dict) for entry in found):
        raise FailedPrecondition("a descriptor isn't a JSON object")
    return found


def descriptor(entry: Any) -> Descriptor:
    """A descriptor as JSON has it."""
    return _descriptor(entry)


def parts(data: bytes) -> list[Descriptor]:
    """What a manifest, of whatever it may be, is made of: its configuration, then its layers."""
    document = _load(data, "manifest")
    layers = [_descriptor(one) for one in _list(document, "layers", MAX_LAYERS)]
    return [_descriptor(document.get("config")), *layers]


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain ID of each layer, bottom first (OCI image-spec, config.md#layer-chainid)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        if not chain:
            chain.append(diff_id)
        else:
            chain.append(f"sha256:{hashlib.sha256(f'{chain[-1]} {diff_id}'.encode()).hexdigest()}")
    return chain


def _check_kind(document: dict[str, Any]) -> None:
    """Refuses what is an index to one reader and a manifest to another (CVE-2021-41190)."""
    if document.get("manifests") and (document.get("layers") or document.get("config")):
        raise FailedPrecondition("the document is an index and a manifest at once", hint="its author must choose")


def _load(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise FailedPrecondition(f"the {what} isn't JSON") from None
    if not isinstance(document, dict):
        raise FailedPrecondition(f"the {what} isn't a JSON object")
    return document


def _list(document: dict[str, Any], key: str, longest: int) -> list[Any]:
    value = document.get(key) or []
    if not isinstance(value, list) or len(value) > longest:
        raise FailedPrecondition(f"{key!r} isn't a list of at most {longest}")
    return value


def as_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as OCI's documents have it."""
    told: dict[str, Any] = {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}
    if descriptor.urls:
        told["urls"] = descriptor.urls
    if descriptor.annotations:
        told["annotations"] = dict(sorted(descriptor.annotations.items()))
    if descriptor.data:
        told["data"] = base64.b64encode(descriptor.data).decode()
    if descriptor.artifact_type:
        told["artifactType"] = descriptor.artifact_type
    if descriptor.platform is not None:
        named = descriptor.platform.model_dump(exclude={"os_version"}) | {"os.version": descriptor.platform.os_version}
        told["platform"] = {key: value for key, value in named.items() if value}
    return told


def _descriptor(entry: Any) -> Descriptor:
    if not isinstance(entry, dict):
        raise FailedPrecondition("a descriptor is missing, or isn't a JSON object")
    try:
        found = Descriptor(
            media_type=entry.get("mediaType", ""), digest=entry.get("digest", ""), size=entry.get("size", -1),
            urls=entry.get("urls") or [], annotations=entry.get("annotations") or {},
            platform=_platform(entry.get("platform")), data=_embedded(entry.get("data")),
            artifact_type=entry.get("artifactType") or "",
        )  # fmt: skip
    except ValidationError:
        raise FailedPrecondition("a descriptor needs a media type, a sha256 or sha512 digest, and a size") from None
    if found.data:
        algorithm = found.digest.partition(":")[0]
        if found.digest != f"{algorithm}:{hashlib.new(algorithm, found.data).hexdigest()}":
            raise FailedPrecondition(f"descriptor of {found.digest}: the data in it is something else")
    return found


def _embedded(value: Any) -> bytes:
    """A descriptor's `data` (descriptor.md, embedded content)."""
    if not value:
        return b""
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise FailedPrecondition("a descriptor's data isn't base64") from None


def _platform(value: Any) -> Platform | None:
    if not isinstance(value, dict):
        return None
    named = {key: value.get(key) or "" for key in ("os", "architecture", "variant")}
    if not all(isinstance(one, str) for one in named.values()) or not named["os"] or not named["architecture"]:
        return None
    version = value.get("os.version")
    return Platform(**named, os_version=version if isinstance(version, str) else "")
