"""Leases in others' transactions: what is made under one is added to it where it is made."""

from __future__ import annotations

from shoal_bus.database import Transaction
from shoal_bus.errors import NotFound


def require(tx: Transaction, namespace: str, lease: str) -> None:
    """Raises NOT_FOUND for a lease that isn't there; nothing happens without one."""
    if lease and not tx.execute("SELECT 1 FROM leases WHERE namespace = ? AND id = ?", (namespace, lease)).fetchone():
        raise NotFound(f"lease {lease}: not found", hint="it may have expired")


def attach(tx: Transaction, namespace: str, lease: str, type: str, id: str) -> None:
    """Adds a resource to a lease, in the transaction that makes it; nothing happens without a lease. NOT_FOUND."""
    if not lease:
        return
    require(tx, namespace, lease)
    tx.execute("INSERT OR IGNORE INTO lease_resources VALUES (?, ?, ?, ?)", (namespace, lease, type, id))


def drop(tx: Transaction, namespace: str, id: str) -> None:
    """Removes a lease with what is said of its resources; ingests that it held are begun no longer."""
    forget_ingests(tx, namespace, id)
    tx.execute("DELETE FROM leases WHERE namespace = ? AND id = ?", (namespace, id))


def forget_ingests(tx: Transaction, namespace: str, lease: str, type: str = "ingests", ref: str = "") -> None:
    """Has ingests that only a lease held be as old as can be, so that they aren't waited for any longer."""
    if type != "ingests":
        return
    held = "SELECT id FROM lease_resources WHERE namespace = :namespace AND type = 'ingests' AND lease"
    tx.execute(
        f"UPDATE ingests SET updated_at = 0 WHERE namespace = :namespace AND pull = '' AND ref IN ({held} = :lease)"  # noqa: S608
        f" AND ref NOT IN ({held} != :lease) AND (:ref = '' OR ref = :ref)",
        {"namespace": namespace, "lease": lease, "ref": ref},
    )
