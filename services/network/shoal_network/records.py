"""What the service remembers: networks, and what is attached to them."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import Any

from shoal_bus.api.network import Attachment, Network
from shoal_bus.database import Database, Transaction
from shoal_bus.message import pack, unpack

MIGRATIONS = [
    """
CREATE TABLE networks (
    namespace  TEXT NOT NULL,
    id         TEXT NOT NULL,
    request_id TEXT NOT NULL,
    path       TEXT NOT NULL,
    labels     BLOB NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE TABLE attachments (
    namespace      TEXT NOT NULL,
    id             TEXT NOT NULL,
    interface      TEXT NOT NULL,
    request_id     TEXT NOT NULL,
    bridge         TEXT NOT NULL,
    bridge_address TEXT NOT NULL,      -- as asked for; empty for none
    attachment     BLOB NOT NULL,
    PRIMARY KEY (namespace, id, interface),
    FOREIGN KEY (namespace, id) REFERENCES networks (namespace, id)
);
CREATE INDEX attachments_bridge ON attachments (bridge);
CREATE TABLE bridge_addresses (        -- those that shoal put there, written before it did
    bridge  TEXT NOT NULL,
    address TEXT NOT NULL,
    PRIMARY KEY (bridge, address)
) WITHOUT ROWID;
"""
]


class Records:
    """The rows; and the names in the kernel that follow from them."""

    def __init__(self, database: Database) -> None:
        self.db = database

    @property
    def netns_suffix(self) -> str:
        """What the last part of the name of every network namespace of this node begins with."""
        return self._hash(self.db.outbox_id)[:6]

    def netns_name(self, namespace: str, id: str) -> str:
        """The name `ip netns` shows: the id, and a hash that tells nodes and namespaces apart."""
        return f"shoal-{id}-{self.netns_suffix}{self._hash(self.db.outbox_id, namespace, id)[:8]}"

    def is_netns_name(self, name: str) -> bool:
        """Whether `netns_name` of this node made this name."""
        first, _, last = name.rpartition("-")
        return first.startswith("shoal-") and len(last) == 14 and last.startswith(self.netns_suffix)

    @property
    def host_prefix(self) -> str:
        """What the name of every host's end of this node begins with."""
        return f"sh{self._hash(self.db.outbox_id)[:5]}"

    def host_interface(self, namespace: str, id: str, interface: str) -> str:
        """The name of the host's end: 15 characters, the most a link's name may have."""
        return f"{self.host_prefix}{self._hash(self.db.outbox_id, namespace, id, interface)[:8]}"

    @staticmethod
    def _hash(*parts: str) -> str:
        text = "\0".join(parts)
        return base64.b32encode(hashlib.blake2b(text.encode(), digest_size=10).digest()).decode().lower()

    def get(self, namespace: str, id: str) -> Network | None:
        row = self.db.read_one("SELECT * FROM networks WHERE namespace = ? AND id = ?", (namespace, id))
        return self._network(row) if row is not None else None

    def of(self, namespace: str) -> list[Network]:
        rows = self.db.read("SELECT * FROM networks WHERE namespace = ? ORDER BY id", (namespace,))
        return [self._network(row) for row in rows]

    def all(self) -> list[tuple[str, Network]]:
        """Every network with its namespace."""
        return [(row["namespace"], self._network(row)) for row in self.db.read("SELECT * FROM networks")]

    def _network(self, row: Any) -> Network:
        key = (row["namespace"], row["id"])
        attached = self.db.read(
            "SELECT attachment FROM attachments WHERE namespace = ? AND id = ? ORDER BY interface", key
        )
        return Network(
            id=row["id"], path=row["path"], labels=unpack(row["labels"]),
            attachments=[Attachment.unpack(one["attachment"]) for one in attached],
            created_at=datetime.fromtimestamp(row["created_at"], UTC),
        )  # fmt: skip

    def add(self, tx: Transaction, namespace: str, network: Network, request_id: str) -> None:
        tx.execute(
            "INSERT INTO networks VALUES (?, ?, ?, ?, ?, ?)",
            (namespace, network.id, request_id, network.path, pack(network.labels), network.created_at.timestamp()),
        )

    def drop(self, tx: Transaction, namespace: str, id: str) -> None:
        tx.execute("DELETE FROM networks WHERE namespace = ? AND id = ?", (namespace, id))

    def attach(self, tx: Transaction, namespace: str, id: str, attachment: Attachment, request_id: str) -> None:
        tx.execute(
            "INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?, ?)",
            (namespace, id, attachment.interface, request_id, attachment.bridge, attachment.bridge_address,
             attachment.pack()),
        )  # fmt: skip

    def detach(self, tx: Transaction, namespace: str, id: str, attachment: Attachment) -> None:
        tx.execute(
            "DELETE FROM attachments WHERE namespace = ? AND id = ? AND interface = ?",
            (namespace, id, attachment.interface),
        )
        if attachment.bridge_address and self.users(attachment.bridge, attachment.bridge_address) == 0:
            tx.execute("DELETE FROM bridge_addresses WHERE bridge = ? AND address = ?",
                       (attachment.bridge, attachment.bridge_address))  # fmt: skip

    def users(self, bridge: str, address: str) -> int:
        """How many attachments asked for this address of this bridge."""
        row = self.db.read_one(
            "SELECT count(*) FROM attachments WHERE bridge = ? AND bridge_address = ?", (bridge, address)
        )
        return int(row[0]) if row is not None else 0

    def claimed(self, bridge: str, address: str) -> bool:
        """Whether shoal put this address there."""
        found = self.db.read_one("SELECT 1 FROM bridge_addresses WHERE bridge = ? AND address = ?", (bridge, address))
        return found is not None

    def claim(self, bridge: str, address: str) -> None:
        """Records, before it does, that shoal puts this address there."""
        with self.db.write() as tx:
            tx.execute("INSERT OR IGNORE INTO bridge_addresses VALUES (?, ?)", (bridge, address))

    def unclaim(self, bridge: str, address: str) -> None:
        """Forgets it again."""
        with self.db.write() as tx:
            tx.execute("DELETE FROM bridge_addresses WHERE bridge = ? AND address = ?", (bridge, address))
