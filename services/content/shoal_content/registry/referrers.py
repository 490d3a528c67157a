"""Referrers: manifests that name another one as their `subject` (OCI image-spec, manifest.md; distribution-spec v1.1).

A registry lists them; of one that doesn't know how, they are in an index under a tag that is made of the subject's
digest, and that whoever pushes keeps.
"""

from __future__ import annotations

import json
from typing import Any

from shoal_bus.errors import FailedPrecondition
from shoal_bus.types import Descriptor, check_digest

from shoal_content import media
from shoal_content.registry.resolver import Referrer

MOST = 4096
_LONGEST_ENCODED = 64


def tag_of(digest: str) -> str:
    """The tag under which a registry without the API has a subject's referrers."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm[:32]}-{encoded[:_LONGEST_ENCODED]}"


def read(data: bytes, artifact_type: str = "") -> list[Referrer]:
    """The manifests of an index, of one type or of all: a registry needn't have filtered them."""
    entries = media.entries(data)
    types = [entry.get("artifactType") for entry in entries]
    found = [
        Referrer(descriptor, kind if isinstance(kind, str) else "")
        for descriptor, kind in zip(media.children(media.OCI_INDEX, data), types, strict=True)
    ]
    return [one for one in found if not artifact_type or one.artifact_type == artifact_type]


def subject_of(data: bytes) -> str:
    """The digest of what a manifest refers to; empty for none."""
    subject = _document(data).get("subject")
    digest = subject.get("digest") if isinstance(subject, dict) else None
    try:
        return check_digest(digest) if isinstance(digest, str) else ""
    except ValueError:
        return ""


def with_referrer(index: bytes | None, descriptor: Descriptor, data: bytes) -> bytes | None:
    """A tag's index with a manifest more; None where it is in there already."""
    manifests: list[Any] = []
    if index is not None:
        manifests = list(media.entries(index))
        if any(one.digest == descriptor.digest for one in media.children(media.OCI_INDEX, index)):
            return None
    entry: dict[str, Any] = {
        "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size,
        "artifactType": artifact_type_of(data),
    }  # fmt: skip
    if annotations := annotations_of(data):
        entry["annotations"] = annotations
    made = {"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": [*manifests, entry]}
    packed = json.dumps(made).encode()
    if len(packed) > media.MAX_MANIFEST_BYTES:
        raise FailedPrecondition("the index of the subject's referrers is full")
    return packed


def artifact_type_of(data: bytes) -> str:
    """What kind of artifact a manifest is of: its `artifactType`, or else its configuration's media type."""
    document = _document(data)
    config = document.get("config")
    kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else "")
    return kind if isinstance(kind, str) else ""


def annotations_of(data: bytes) -> dict[str, str]:
    """A manifest's annotations."""
    annotations = _document(data).get("annotations")
    if not isinstance(annotations, dict):
        return {}
    return {key: value for key, value in annotations.items() if isinstance(value, str)}


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
