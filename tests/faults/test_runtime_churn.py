"""Hundreds of kills in a row while containers churn: no exit lost, none doubled, nothing left, every answer right."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from itertools import count
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api

from tests.support.killer import Killer
from tests.support.ledger import differences
from tests.support.lives import Life, committed_busybox, describe
from tests.support.natsd import NatsServer
from tests.support.orphans import Orphans, in_place_of_init
from tests.support.runtime import RuntimeNode, runtime_node

log = logging.getLogger(__name__)

KILLS = int(os.environ.get("SHOAL_CHURN_KILLS", "300"))
SEED = int(os.environ.get("SHOAL_CHURN_SEED", "0")) or random.randrange(1, 1 << 32)
WORKERS = 8
PAUSE_SECONDS = 0.08


class Churn:
    """Workers that lead lives, until they are told to stop."""

    def __init__(self, node: RuntimeNode, chance: random.Random, parent: str) -> None:
        self.node, self.chance, self.parent = node, chance, parent
        self.at_work: set[str] = set()
        self.killer = Killer(node, random.Random(chance.random()), self.at_work, PAUSE_SECONDS)
        self.lives: list[Life] = []
        self.failed: list[Life] = []
        self._over = False

    async def run(self, kills: int) -> None:
        workers = [asyncio.create_task(self._work(number)) for number in range(WORKERS)]
        killing = asyncio.create_task(self.killer.run(kills))
        try:
            await asyncio.wait([killing, *workers], return_when=asyncio.FIRST_COMPLETED)
            self._over = True
            if not any(worker.done() for worker in workers):
                await killing
            await asyncio.gather(*workers)
        finally:
            for task in (killing, *workers):
                task.cancel()
            await asyncio.gather(killing, *workers, return_exceptions=True)

    async def _work(self, worker: int) -> None:
        for number in count():
            if self._over:
                return
            id = f"w{worker}n{number}"
            parent = self.parent if self.chance.random() < 0.5 else ""
            life = Life(self.node, id, random.Random(self.chance.random()), self._is_hurt, parent)
            self.lives.append(life)
            self.at_work.add(id)
            try:
                await life.lead()
            except Exception:
                self.failed.append(life)
                raise
            self.at_work.discard(id)

    def _is_hurt(self, id: str) -> bool:
        return id in self.killer.kills.hurt

    @property
    def summary(self) -> str:
        kills = self.killer.kills
        return f"{dict(kills.counts)} in {len(self.lives)} lives, {len(kills.hurt)} of them hurt"

    async def events_agree(self) -> None:
        """Waits for the last events, and holds all of them against what was answered."""
        ids = {life.id for life in self.lives}
        async with asyncio.timeout(30):
            while {e.id for e in self.node.events if e.topic == "/containers/delete"} != ids:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # for what would come twice
        wrong = []
        for life in self.lives:
            events = [event for event in self.node.events if event.id == life.id]
            if found := differences(life.told, events):
                self.failed.append(life)
                topics = [(e.topic, e.payload.get("id"), e.payload.get("exit_status")) for e in events]
                wrong.append(f"{life.id}: {found} in {topics}")
        assert not wrong, "\n".join(wrong)


async def watch_for_zombies(orphans: Orphans, found: list[str]) -> None:
    while True:
        found += [str(entry) for entry in orphans.unreaped()]
        await asyncio.sleep(0.2)


def files_left(node: RuntimeNode) -> list[str]:
    """What is in the runtime service's state directory besides what belongs there when no container is left."""
    state = node.node.state / "runtime"
    theirs = {"locks", "zygote.lock", "log", "shims", "bundles", "oci"}
    return [str(path) for path in state.iterdir() if path.name not in theirs] + [
        str(path) for name in ("shims", "bundles", "oci/*") for path in state.glob(f"{name}/*")
    ]


def complaints(node: RuntimeNode) -> list[str]:
    """What the services logged that nobody had foreseen."""
    return [
        f"{service.log.name}: {line}"
        for service in node.node.services
        for line in service.log.read_text().splitlines()
        if "Traceback" in line or '"level": "error"' in line
    ]


@pytest.mark.timeout(180 + 2 * KILLS)
async def test_whatever_is_killed_no_exit_is_lost_or_doubled_and_nothing_is_left(
    tmp_path: Path, natsd: NatsServer
) -> None:
    churn: Churn | None = None

    def own() -> set[int]:
        pids = {service.pid for service in churn.node.node.services if service.running} if churn is not None else set()
        return pids | {natsd.pid}

    try:
        with in_place_of_init(own) as orphans:
            async with runtime_node(tmp_path, natsd, copies=2, others=("snapshot",)) as node:
                churn = Churn(node, random.Random(SEED), await committed_busybox(node))
                zombies: list[str] = []
                watching = asyncio.create_task(watch_for_zombies(orphans, zombies))
                await churn.run(KILLS)
                await churn.events_agree()
                assert not node.of_containers()
                assert not await node.client.collect(api.TASK_LIST, api.ListTasks())
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                assert watching.cancelled(), watching.exception()
                assert not zombies
            async with asyncio.timeout(20):
                while orphans.living():
                    await asyncio.sleep(0.05)
        assert files_left(node) == []
        assert complaints(node) == []
    except BaseException as error:
        error.add_note(f"SHOAL_CHURN_SEED={SEED}, killed {churn.summary if churn is not None else 'nobody'}")
        if churn is not None:
            error.add_note(describe(churn.failed, churn.killer.kills.hurt))
            (tmp_path / "journal").write_text(describe(churn.lives, churn.killer.kills.hurt))
        raise
    log.info("killed %s", churn.summary)
