"""Garbage collection: one mark and sweep over content, snapshot and runtime (`shoal_bus.collection` has its steps).

One collector is at work at a time, whichever copy it is in (a lock that dies with its holder). It needs the snapshot
and the runtime service: a collection is abandoned, with nothing of the rest removed, when one of them doesn't answer,
or an epoch turns out to be over. A service that has never been on this node is not missed: nothing of it can be there.
What deletes something asks for a collection (`after_deletion`); in the database there is a word of it (`wanted`), so
that another copy, or the next one, makes the one that a dead copy owed.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import structlog
from shoal_bus.api import runtime, snapshot
from shoal_bus.api.content import IMAGES_DELETE, Collect, Collected, Collection, ImageDeleted
from shoal_bus.client import Client, Unreached
from shoal_bus.collection import Candidate, Epoch, Sweep, expiry
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import Aborted, ShoalError
from shoal_bus.locks import Locks
from shoal_bus.message import Message, Request
from shoal_bus.verb import AnyVerb, StreamVerb, Verb

from shoal_content import leasing
from shoal_content.blobs.ingests import Ingests
from shoal_content.blobs.layout import Layout
from shoal_content.blobs.store import Store
from shoal_content.collection.roots import MOUNTS, Elsewhere, Mark, Node, changed_since, mark
from shoal_content.labels import load

log = structlog.get_logger(__name__)

LOCK = "collection"
_PATIENCE_SECONDS = 2.0
_CALL_SECONDS = 60.0
_DELAY_SECONDS = 0.1
"""From a deletion to its collection: several are collected at once."""
_SHARE = 0.02
"""Of the time may be spent on collections that nobody waits for (containerd's `pause_threshold`)."""
_LOOK_SECONDS = 2.0
_PERIOD_SECONDS = 300.0
"""Between collections that nobody asked for: what only snapshot or runtime knows to be superfluous goes then."""
_LONGEST_PAUSE_SECONDS = 60.0
_SWEPT_AT_ONCE = 100
_ASKED = 2
"""`collection.wanted` where somebody has asked for the collection that is owed."""
_TOLD = 1000

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Item = TypeVar("Item", bound=Message)
V = TypeVar("V", bound=AnyVerb)


@dataclass
class _Removed:
    """What a collection has removed so far."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[Node] = field(default_factory=list)
    bytes: int = 0

    def add(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self.counts[node.type] += 1
            if len(self.first) < _TOLD:
                self.first.append(node)


class Collector:
    """Collections of one node: made, waited for, and due."""

    def __init__(
        self, database: Database, store: Store, ingests: Ingests, layout: Layout, locks: Locks, client: Client
    ) -> None:
        self._db, self._store, self._ingests, self._layout = database, store, ingests, layout
        self._locks, self._client = locks, client
        self._next: asyncio.Task[Collection] | None = None
        self._at_work: asyncio.Task[Collection] | None = None
        self._wake = asyncio.Event()
        self._asked = False
        """Whether somebody has asked for the next collection."""
        self._looked_at = 0.0
        """What had expired by then has been collected, or something else holds it."""

    # ---------------------------------------------------------------------------------------------------- asked for

    async def gc(self, ctx: Context, request: Collect) -> Collection:
        """A collection that begins after this request came. UNAVAILABLE or ABORTED when it can't be made."""
        if request.soon:
            self.want()
            return Collection()
        return await self.collect()

    async def collect(self, *, asked: bool = True) -> Collection:
        """A collection that begins from now on; those who ask at the same time share one.

        One that nobody has `asked` for spares what has been written of late under no lease.
        """
        self._asked = self._asked or asked
        if self._next is None:
            self._next = asyncio.create_task(self._collect_next())
        return await asyncio.shield(self._next)

    async def after_deletion(self, *, wait: bool, asked: bool = True) -> None:
        """Has what a deletion made superfluous collected: before this returns, if it can be now, or a little later.

        A deletion that nobody has `asked` for isn't a reason to collect what others have only just written.
        """
        if not wait:
            self.want()
            return
        try:
            await self.collect(asked=asked)
        except (ShoalError, OSError, sqlite3.Error) as error:
            # What was deleted is deleted, and its transaction says that a collection is owed.
            log.warning("collection.later", error=str(error))

    def want(self) -> None:
        """Asks for a collection soon."""
        with self._db.write() as tx:
            want(tx)
        self.look_again()

    def look_again(self) -> None:
        """Has this copy look now what is due."""
        self._wake.set()

    async def stop(self) -> None:
        """Abandons the collection under way: the next copy makes another."""
        tasks = [task for task in (self._at_work, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect_next(self) -> Collection:
        async with self._locks.hold(LOCK):
            self._at_work, self._next = self._next, None  # whoever asks from here on has come too late for this one
            asked, self._asked = self._asked, False
            return await self._collect(asked=asked)

    # ------------------------------------------------------------------------------------------------------------ due

    async def run_for_ever(self) -> None:
        """Makes the collections that are owed or due, one at the start."""
        pause, last = 0.0, time.monotonic() - _PERIOD_SECONDS
        while True:
            await self._until_due(last, pause)
            try:
                made = await self.collect(asked=False)
                last, pause = time.monotonic(), min(made.seconds / _SHARE, _LONGEST_PAUSE_SECONDS)
            except (ShoalError, OSError, sqlite3.Error) as error:
                pause = min(max(_LOOK_SECONDS, pause * 2), _LONGEST_PAUSE_SECONDS)
                log.info("collection.abandoned", error=str(error), again_in=pause)
            except Exception:
                pause = _LONGEST_PAUSE_SECONDS
                log.exception("collection.failed")

    async def _until_due(self, last: float, pause: float) -> None:
        if pause:
            await asyncio.sleep(pause)
        while time.monotonic() - last < _PERIOD_SECONDS:
            self._wake.clear()
            due = self._due_in()
            if due <= 0:
                await asyncio.sleep(_DELAY_SECONDS)
                return
            try:
                async with asyncio.timeout(min(due, _LOOK_SECONDS)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _due_in(self) -> float:
        """Seconds until something is to be collected: none if a collection is owed, or something has expired."""
        row = self._db.read_one("SELECT wanted FROM collection")
        if row is not None and row["wanted"]:
            return 0.0
        rows = self._db.read(
            "SELECT labels FROM leases WHERE labels LIKE '%containerd.io/gc.expire%'"
            " UNION ALL SELECT labels FROM images WHERE labels LIKE '%containerd.io/gc.expire%'"
        )
        times = [at for row in rows if (at := expiry(load(row["labels"]))) is not None and at > self._looked_at]
        return min(times) - time.time() if times else _PERIOD_SECONDS

    # ------------------------------------------------------------------------------------------------- one collection

    async def _collect(self, *, asked: bool) -> Collection:
        began, removed = time.monotonic(), _Removed()
        epoch = Epoch(token=secrets.token_hex(12))
        opened_at = time.time()
        with self._db.write() as tx:
            tx.execute("DELETE FROM collection_kept")
            asked = asked or tx.execute("SELECT 1 FROM collection WHERE wanted = ?", (_ASKED,)).fetchone() is not None
            tx.execute("UPDATE collection SET token = ?, open = 1, wanted = 0", (epoch.token,))
        try:
            peers = [self._peer(epoch, "snapshot"), self._peer(epoch, "runtime")]
            await _all(peer.open() for peer in peers)
            peers += await self._others(epoch, peers[0].snapshotters)
            holders = await peers[1].tell(runtime.GC_HOLDERS)
            snapshotters = [peer for peer in peers if peer.name != "runtime"]
            labelled = [one for peer in snapshotters for one in await peer.tell(snapshot.GC_LABELLED)]
            elsewhere = Elsewhere(holders, labelled, await peers[1].tell(runtime.GC_MOUNTS))
            marked = await self._sweep_own(epoch.token, elsewhere, opened_at, removed, asked)
            await self._sweep_mounts(peers[1], marked, removed)  # before the snapshots that they may be of
            for peer in snapshotters:
                await self._sweep_snapshots(peer, marked, removed)
            await _all(peer.close() for peer in peers)
        except BaseException:
            with self._db.write() as tx:
                want(tx, asked=asked)
                # A sweep of snapshots may still be under way: then leases go on telling it what they get.
                tx.execute("UPDATE collection SET open = 0 WHERE token = ? AND open = 1", (epoch.token,))
                tx.execute("DELETE FROM collection_kept WHERE NOT (SELECT open FROM collection)")
            raise
        self._remember(peers, marked)
        self._looked_at = opened_at
        with self._db.write() as tx:
            tx.execute("UPDATE collection SET open = 0 WHERE token = ?", (epoch.token,))
            tx.execute("DELETE FROM collection_kept")
        removed.bytes += self._store.purge()
        seconds = time.monotonic() - began
        if removed.counts:
            log.info("collection.done", **removed.counts, bytes=removed.bytes, seconds=round(seconds, 3))
        return Collection(
            counts=dict(removed.counts), bytes=removed.bytes, seconds=seconds,
            removed=[Collected(namespace=one.namespace, type=one.type, id=one.id) for one in removed.first],
        )  # fmt: skip

    async def _sweep_own(
        self, token: str, elsewhere: Elsewhere, opened_at: float, removed: _Removed, asked: bool
    ) -> Mark:
        """Marks, and removes what wasn't reached of this service's own, unless something has come to lead there since.

        The mark looks at everything, so it is made in a thread, on a connection of its own, while requests are served.
        """
        marked = await asyncio.to_thread(_marked, self._db.path, elsewhere, opened_at, asked)
        if not marked.garbage:
            return marked
        idle = [node for node in marked.ingests if self._locks.try_acquire(_ingest_lock(node))]
        try:
            with self._db.write() as tx:
                self._check(tx, token)
                marked.spare({*changed_since(self._db.read, marked.seen), *(set(marked.ingests) - set(idle))})
                tx.execute("UPDATE collection SET open = 2")  # what is removed now is nothing to be kept
                self._remove(tx, marked)
        finally:
            for node in idle:
                self._locks.release(_ingest_lock(node))
        removed.add(marked.garbage)
        return marked

    def _remove(self, tx: Transaction, marked: Mark) -> None:
        for node in marked.leases:
            leasing.drop(tx, node.namespace, node.id)
        for node in marked.images:
            tx.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (node.namespace, node.id))
            tx.emit(node.namespace, IMAGES_DELETE, ImageDeleted(name=node.id))
        for node in marked.ingests:
            self._ingests.drop(tx, node.namespace, node.id)
        for node in marked.blobs:
            self._store.hide(tx, node.namespace, node.id)

    @staticmethod
    async def _sweep_mounts(peer: _Peer, marked: Mark, removed: _Removed) -> None:
        """Has the runtime service take away what is mounted and isn't reached."""
        unreached: dict[str, list[str]] = {}
        for node in marked.mounts:
            unreached.setdefault(node.namespace, []).append(node.id)
        for namespace, names in unreached.items():
            for at in range(0, len(names), _SWEPT_AT_ONCE):
                swept = await peer.sweep_mounts(namespace, names[at : at + _SWEPT_AT_ONCE])
                removed.add(Node(namespace, MOUNTS, name) for name in swept)

    async def _sweep_snapshots(self, peer: _Peer, marked: Mark, removed: _Removed) -> None:
        """Removes the snapshots that aren't reached, top first, until there is none left that nothing lies on."""
        while True:
            unreached: dict[tuple[str, str], list[str]] = {}
            for candidate in await peer.tell(snapshot.GC_CANDIDATES):
                keys = _unreached(candidate, marked)
                unreached.setdefault((candidate.namespace, candidate.snapshotter), []).extend(keys)
            before = removed.counts.total()
            for (namespace, snapshotter), keys in unreached.items():
                for at in range(0, len(keys), _SWEPT_AT_ONCE):
                    swept = await peer.sweep(namespace, snapshotter, keys[at : at + _SWEPT_AT_ONCE])
                    removed.add(Node(namespace, f"snapshots/{snapshotter}", key) for key in swept)
            if removed.counts.total() == before:
                return

    def _peer(self, epoch: Epoch, name: str) -> _Peer:
        """A service that takes part. It is missed if it has ever done so, or has left something under our root."""
        row = self._db.read_one("SELECT 1 FROM collection_peers WHERE name = ?", (name,))
        known = row is not None or (self._layout.root.parent / name).exists()
        return _Peer(self._client, epoch, name, known=known)

    async def _others(self, epoch: Epoch, have: Sequence[str]) -> list[_Peer]:
        """Snapshotters that are processes of their own, as far as they answer: nothing is swept of one that doesn't."""
        rows = self._db.read("SELECT name FROM collection_peers WHERE name LIKE 'snapshots/%'")
        names = {row["name"].removeprefix("snapshots/") for row in rows} - set(have)
        others = [_Peer(self._client, epoch, name, known=False) for name in sorted(names)]
        outcomes = await asyncio.gather(*(peer.open() for peer in others), return_exceptions=True)
        for peer, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.warning("collection.snapshotter_left_out", snapshotter=peer.name, error=str(outcome))
        return [peer for peer in others if peer.there]

    def _remember(self, peers: Sequence[_Peer], marked: Mark) -> None:
        """Notes who has taken part, and which snapshotters there may be besides, for the next collection."""
        names = {peer.name for peer in peers if peer.there}
        names |= {node.type for node in marked.reached if node.type.startswith("snapshots/")}
        known = {row["name"] for row in self._db.read("SELECT name FROM collection_peers")}
        if names - known:
            with self._db.write() as tx:
                for name in names - known:
                    tx.execute("INSERT OR IGNORE INTO collection_peers VALUES (?)", (name,))

    @staticmethod
    def _check(tx: Transaction, token: str) -> None:
        row = tx.execute("SELECT token, open FROM collection").fetchone()
        if (row["token"], row["open"]) != (token, 1):
            raise Aborted("this collection's epoch is no longer open")


class _Peer:
    """Another process's part in one collection: `snapshot`, `runtime`, or a snapshotter of its own."""

    def __init__(self, client: Client, epoch: Epoch, name: str, *, known: bool) -> None:
        self._client, self._epoch, self.name = client, epoch, name
        self._known, self.there = known, False
        self.snapshotters: list[str] = []

    def on(self, verb: V) -> V:
        return verb.on(self.name) if self.name not in ("snapshot", "runtime") else verb

    async def open(self) -> None:
        """Opens the epoch there. UNAVAILABLE when it doesn't answer, unless it has never been here."""
        verb = runtime.GC_OPEN if self.name == "runtime" else self.on(snapshot.GC_OPEN)
        try:
            opened = await self._call(verb, self._epoch, patience=_PATIENCE_SECONDS if self._known else 0.0)
        except Unreached:
            if self._known:
                raise
            return
        self.there, self.snapshotters = True, opened.snapshotters

    async def tell(self, verb: StreamVerb[Epoch, Item]) -> list[Item]:
        """What it has to say of the epoch; nothing if it isn't there."""
        if not self.there:
            return []
        return await self._client.collect(self.on(verb), self._epoch, timeout=_CALL_SECONDS)

    async def sweep(self, namespace: str, snapshotter: str, keys: Sequence[str]) -> list[str]:
        """Has it remove snapshots, and says which it has removed."""
        request = Sweep(token=self._epoch.token, namespace=namespace, snapshotter=snapshotter, keys=list(keys))
        return (await self._call(self.on(snapshot.GC_SWEEP), request, patience=_PATIENCE_SECONDS)).keys

    async def sweep_mounts(self, namespace: str, names: Sequence[str]) -> list[str]:
        """Has it take away activations, and says which are gone."""
        request = runtime.SweepMounts(token=self._epoch.token, namespace=namespace, names=list(names))
        return (await self._call(runtime.GC_SWEEP, request, patience=_PATIENCE_SECONDS)).names

    async def close(self) -> None:
        """Closes the epoch there. One that stays open does no harm until the next one."""
        if self.there:
            verb = runtime.GC_CLOSE if self.name == "runtime" else self.on(snapshot.GC_CLOSE)
            try:
                await self._call(verb, self._epoch, patience=0.0)
            except ShoalError as error:
                log.info("collection.left_open", service=self.name, error=str(error))

    async def _call(self, verb: Verb[Req, Rep], request: Req, *, patience: float) -> Rep:
        return await self._client.call(verb, request, timeout=_CALL_SECONDS, patience=patience)


def want(tx: Transaction, *, asked: bool = False) -> None:
    """Notes that something may have become superfluous, or that somebody has asked for a collection."""
    tx.execute("UPDATE collection SET wanted = ?1 WHERE wanted < ?1", (_ASKED if asked else 1,))


def _marked(path: Path, elsewhere: Elsewhere, now: float, asked: bool) -> Mark:
    """The mark, as of one moment."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN")
        return mark(
            lambda sql, *parameters: connection.execute(sql, *parameters).fetchall(), elsewhere, now, asked=asked
        )


def _unreached(candidate: Candidate, marked: Mark) -> list[str]:
    type = f"snapshots/{candidate.snapshotter}"
    return list(takewhile(lambda key: Node(candidate.namespace, type, key) not in marked.reached, candidate.keys))


def _ingest_lock(node: Node) -> str:
    """The lock, as the harness names it, under which a client's ingest is written to."""
    return f"{node.namespace} ingest/{node.id}"


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """Does all at once, to the end, and raises the first error."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
