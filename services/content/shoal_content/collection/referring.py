"""The labels that a pull gives what it brought, as containerd's does: what leads to what, and where it came from.

A manifest's and an index's name their children (`containerd.io/gc.ref.content.config`, `.l.<layer>`, `.m.<manifest>`),
a configuration's the snapshot that its layers unpacked to (`containerd.io/gc.ref.snapshot.<snapshotter>`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from shoal_bus.collection import REFERENCE
from shoal_bus.database import Transaction
from shoal_bus.errors import ShoalError
from shoal_bus.types import Labels, is_digest

from shoal_content import media
from shoal_content.blobs.store import Store
from shoal_content.labels import dump, load

CONTENT = f"{REFERENCE}content."
SNAPSHOT = f"{REFERENCE}snapshot."


def label_tree(
    tx: Transaction, store: Store, namespace: str, digests: Iterable[str], unpacked: Iterable[tuple[str, str]]
) -> None:
    """Labels the documents among `digests`, all of a namespace's own, and what is unpacked: (snapshotter, chain ID)."""
    tops = list(unpacked)
    for digest in digests:
        size = store.size(namespace, digest)
        if size is None or size > media.MAX_MANIFEST_BYTES:
            continue
        data = store.document(digest)
        if data is not None:
            add_labels(tx, namespace, digest, {**children(data), **_snapshots(data, tops)})


def children(data: bytes) -> Labels:
    """The labels that name what an index or a manifest leads to."""
    document = _read(data)
    named = {"config": document.get("config")}
    for prefix, key in (("m", "manifests"), ("l", "layers")):
        value = document.get(key)
        if isinstance(value, list):
            named |= {f"{prefix}.{at}": entry for at, entry in enumerate(value[: media.MAX_REFERENCES])}
    return {f"{CONTENT}{name}": digest for name, entry in named.items() if (digest := _digest(entry))}


def _snapshots(data: bytes, unpacked: Iterable[tuple[str, str]]) -> Labels:
    if not _read(data).get("rootfs"):
        return {}
    try:
        chain = media.chain_ids(media.read_config(data).diff_ids)
    except ShoalError:
        return {}
    return {f"{SNAPSHOT}{name}": key for name, key in unpacked if chain and key == chain[-1]}


def add_labels(tx: Transaction, namespace: str, digest: str, labels: Labels) -> None:
    """Adds labels to a blob; nothing happens if the namespace doesn't see it."""
    had = _labels(tx, namespace, digest)
    if had is not None and labels.items() - had.items():
        _write(tx, namespace, digest, had | labels)


def _labels(tx: Transaction, namespace: str, digest: str) -> Labels | None:
    row = tx.execute("SELECT labels FROM visible WHERE namespace = ? AND digest = ?", (namespace, digest)).fetchone()
    return load(row["labels"]) if row is not None else None


def _write(tx: Transaction, namespace: str, digest: str, labels: Labels) -> None:
    tx.execute("UPDATE visible SET labels = ? WHERE namespace = ? AND digest = ?", (dump(labels), namespace, digest))


def _read(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _digest(entry: Any) -> str:
    digest = entry.get("digest") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) and is_digest(digest) else ""
