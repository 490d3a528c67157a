"""Kills the parts of a node while it works: the service, the zygote, shims, containers, OCI runtimes.

Every kill is a SIGKILL and is aimed at a process below this one, so that nothing else on the machine is hit. Whose
container it hurt is written down: what a container that wasn't hurt answers must be as if nothing had been.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support import process_table
from tests.support.node import ServiceProcess
from tests.support.process_table import Entry
from tests.support.runtime import RuntimeNode

SERVICE, ZYGOTE, SHIM, WORKER, INIT, RUNTIME = "service", "zygote", "shim", "worker", "init", "runc"
WEIGHTS = {SERVICE: 6, ZYGOTE: 8, SHIM: 16, WORKER: 12, INIT: 24, RUNTIME: 34}
"""How often each is killed, of a hundred times: a service takes most of a second to start again."""


@dataclass
class Kills:
    """What has been killed so far: how many of each, and which containers it hurt, with when and what."""

    counts: Counter[str] = field(default_factory=Counter)
    hurt: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counts.total()

    def note(self, kind: str, victim: Entry, ids: list[str]) -> None:
        self.counts[kind] += 1
        for id in ids:
            self.hurt.setdefault(id, []).append(f"{time.monotonic():.3f} {kind} {victim}")


class Killer:
    """`at_work` are the containers whose lives are under way: a victim that nobody can name may have hurt any."""

    def __init__(self, node: RuntimeNode, chance: random.Random, at_work: set[str], pause: float) -> None:
        self._node, self._chance, self._at_work, self._pause = node, chance, at_work, pause
        self.kills = Kills()
        self._restarts: dict[ServiceProcess, asyncio.Task[None]] = {}

    async def run(self, wanted: int) -> None:
        """Until so many have been killed, and what was killed of the service is there again."""
        while self.kills.total < wanted:
            await asyncio.sleep(self._chance.uniform(0, 2 * self._pause))
            (kind,) = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
            for service in [service for service, restart in self._restarts.items() if restart.done()]:
                self._restarts.pop(service).result()
            if kind == SERVICE:
                self._kill_service()
            else:
                self._kill_one(kind)
        await asyncio.gather(*self._restarts.values())

    def _kill_service(self) -> None:
        """One of its copies, also one that is just starting."""
        running = [service for service in self._node.node.services if service.name == "runtime" and service.running]
        if not running:
            return
        service = self._chance.choice(running)
        entry = process_table.look(service.pid)
        if entry is not None and entry.signal():
            self.kills.note(SERVICE, entry, [])
            if service not in self._restarts:
                self._restarts[service] = asyncio.create_task(self._restart(service))

    async def _restart(self, service: ServiceProcess) -> None:
        while True:
            kills = self.kills.counts[SERVICE]
            try:
                await asyncio.to_thread(service.kill)  # reaps it
                await asyncio.to_thread(service.start)
                return
            except AssertionError:
                if kills == self.kills.counts[SERVICE]:
                    raise  # it wasn't we

    def _kill_one(self, kind: str) -> None:
        entries = {entry.pid: entry for entry in process_table.below(os.getpid()) if not entry.is_zombie}
        victims = [entry for entry in entries.values() if _kind(entry, entries) == kind]
        if not victims:
            return
        victim = self._chance.choice(victims)
        ids = [] if kind == ZYGOTE else list(self._hurt_by(victim, entries))
        # Before the signal: what comes of it may be seen at once.
        for id in ids:
            self.kills.hurt.setdefault(id, [])
        if victim.signal():
            self.kills.note(kind, victim, ids)

    def _hurt_by(self, victim: Entry, entries: dict[int, Entry]) -> Iterator[str]:
        """The containers that a process belongs to: those it names, or its ancestors do, or else all at work."""
        shims = self._shims()
        entry: Entry | None = victim
        while entry is not None:
            if entry.pid in shims:
                yield shims[entry.pid]
                return
            words = {*entry.arguments, *(path.rpartition("/")[2] for path in entry.cgroups)}
            if named := words & self._at_work:
                yield from named
                return
            if entry.name == "shoal-zygote":
                break
            entry = entries.get(entry.parent)
        yield from list(self._at_work)

    def _shims(self) -> dict[int, str]:
        found = {}
        for place in (self._node.node.state / "runtime" / "shims").glob("*/shim.json"):
            try:
                record = json.loads(place.read_text())
            except (OSError, ValueError):
                continue  # removed meanwhile
            found[int(record["pid"])] = str(record["id"])
        return found


def _kind(entry: Entry, entries: dict[int, Entry]) -> str:
    if entry.name == "shoal-zygote":
        return ZYGOTE
    if entry.name == "shoal-shim":
        return SHIM
    if entry.name == "shoal-worker":
        return WORKER
    if entry.name.startswith("runc"):
        return RUNTIME
    parent = entries.get(entry.parent)
    return INIT if parent is not None and parent.name == "shoal-shim" else ""
