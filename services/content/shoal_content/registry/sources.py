"""Which repositories of a registry have a blob, as its label says: another one of that registry may share it.

Containerd's label: `containerd.io/distribution.source.<registry>`, repositories with commas between them.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal_bus.database import Transaction
from shoal_bus.image_reference import Reference, is_repository
from shoal_bus.types import Labels

from shoal_content.labels import dump, load

PREFIX = "containerd.io/distribution.source."
_MOST = 16


def repositories(labels: Labels, where: Reference) -> list[str]:
    """The other repositories of a registry that have a blob with these labels."""
    found = labels.get(PREFIX + where.domain, "").split(",")
    return [one for one in found if one != where.path and is_repository(one)][:_MOST]


def remember(tx: Transaction, namespace: str, digests: Iterable[str], where: Reference) -> None:
    """Labels those blobs that the namespace sees: the repository has them."""
    for digest in digests:
        row = tx.execute(
            "SELECT labels FROM visible WHERE namespace = ? AND digest = ?", (namespace, digest)
        ).fetchone()
        if row is None:
            continue
        labels = load(row["labels"])
        known = [one for one in labels.get(PREFIX + where.domain, "").split(",") if one]
        if where.path in known:
            continue
        labels[PREFIX + where.domain] = ",".join(sorted([*known, where.path][-_MOST:]))
        tx.execute(
            "UPDATE visible SET labels = ? WHERE namespace = ? AND digest = ?", (dump(labels), namespace, digest)
        )
