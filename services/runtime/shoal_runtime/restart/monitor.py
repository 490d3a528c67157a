"""Who sees to it that containers are started again: each copy of the service, and none twice.

A copy looks at a container when it has recorded its exit, when its labels change, when it is due, and every now and
then at all of them, for what happened while no copy was there. What is due it asks the service for, that is whichever
copy is free: under the container's lock that one looks again, so asking once too often changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog
from shoal_bus import restart
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.errors import Aborted, NotFound, ShoalError

from shoal_runtime.restart.decision import INTERVAL_SECONDS, Decision, Look, decide
from shoal_runtime.restart.rows import Rows

log = structlog.get_logger(__name__)

_AT_ONCE = 8
"""Starts under way at once: a reboot makes all of them due together."""
_AFTER_AN_ERROR_SECONDS = 1.0
_CALL_SECONDS = 60.0

Key = tuple[str, str]


class Monitor:
    """One copy's watch over the containers that have a desired status. `client_of` gives a client for a namespace."""

    def __init__(self, rows: Rows, client_of: Callable[[str], Client], interval: float = INTERVAL_SECONDS) -> None:
        self._rows, self._client_of, self._interval = rows, client_of, interval
        self._changed: set[Key] = set()
        self._wake = asyncio.Event()
        self._everything = 0.0  # when to look at all of them next
        self._due: dict[Key, float] = {}
        self._found: dict[Key, tuple[tuple[str, ...], float]] = {}
        self._complained: dict[Key, str] = {}
        self._busy: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def look_at(self, namespace: str, id: str) -> None:
        """Has the watch look at a container now: something has become of it."""
        self._changed.add((namespace, id))
        self._wake.set()

    def look_everywhere(self) -> None:
        """Has the watch look at all of them now."""
        self._everything = 0.0
        self._wake.set()

    async def watch_for_ever(self) -> None:
        """Looks, acts on what is due, and waits for what is next."""
        while True:
            now = time.time()
            if not now < self._everything <= now + self._interval:  # due, or the clock was set back
                self._everything = now + self._interval
                self._look_at_all()
            else:
                for key in self._changed | {key for key, at in self._due.items() if at <= now}:
                    self._look_once(key)
            try:
                async with asyncio.timeout(max(0.0, min([self._everything, *self._due.values()]) - time.time())):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def stop(self) -> None:
        """Leaves what is under way to the next copy."""
        tasks = list(self._busy.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------- one look

    def _look_at_all(self) -> None:
        try:
            looks = {look.key: look for look in self._rows.looks()}
        except Exception:
            log.exception("restart.look_failed")
            return
        self._changed.clear()
        for known in (self._due, self._found, self._complained):
            for key in known.keys() - looks.keys():
                del known[key]
        for key, look in looks.items():
            self._consider(key, look)

    def _look_once(self, key: Key) -> None:
        self._changed.discard(key)
        try:
            self._consider(key, self._rows.look(*key))
        except Exception:
            log.exception("restart.look_failed", namespace=key[0], container=key[1])
            self._due[key] = time.time() + _AFTER_AN_ERROR_SECONDS

    def _consider(self, key: Key, look: Look | None) -> None:
        self._due.pop(key, None)
        if look is None or key in self._busy:  # once that is over, it is looked at again
            return
        situation, since = self._found.get(key, ((), 0.0))
        if situation != look.situation:
            since = time.time()
            self._found[key] = (look.situation, since)
        if 0.0 < look.failed_at < look.exited_at:
            self._rows.recovered(look)
        self._complain(look)
        decision = decide(look, since=since, interval=self._interval)
        if decision is None:
            return
        if decision.at > time.time():
            self._due[key] = decision.at
            return
        task = asyncio.create_task(self._act(look, decision))
        self._busy[key] = task
        task.add_done_callback(partial(self._no_longer_busy, key))

    def _complain(self, look: Look) -> None:
        """Says once what is wrong with a container's labels: containerd takes any, and so do we."""
        policy = look.labels.get(restart.POLICY, "")
        if policy == self._complained.get(look.key, ""):
            return
        self._complained[look.key] = policy
        try:
            restart.policy_of(look.labels)
        except ValueError as error:
            log.warning("restart.bad_label", namespace=look.namespace, container=look.id, error=str(error))

    # ---------------------------------------------------------------------------------------------------- what is due

    async def _act(self, look: Look, decision: Decision) -> None:
        namespace, id = look.key
        client = self._client_of(namespace)
        async with self._slots:
            try:
                if decision.action == "stop":
                    await client.call(
                        api.TASK_DELETE, api.DeleteTask(container_id=id, force=True), timeout=_CALL_SECONDS
                    )
                    log.info("container.stopped", namespace=namespace, container=id)
                else:
                    request = api.RestartContainer(id=id, after=look.latest)
                    await client.call(api.CONTAINER_RESTART, request, timeout=_CALL_SECONDS)
            except (Aborted, NotFound) as error:  # somebody was faster
                log.debug("restart.not_needed", namespace=namespace, container=id, error=str(error))
            except ShoalError as error:
                log.warning("restart.failed", namespace=namespace, container=id, error=str(error))
                await asyncio.sleep(_AFTER_AN_ERROR_SECONDS)

    def _no_longer_busy(self, key: Key, task: asyncio.Task[None]) -> None:
        self._busy.pop(key, None)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("restart.failed", namespace=key[0], container=key[1], exc_info=error)
                self._due[key] = time.time() + _AFTER_AN_ERROR_SECONDS
                self._wake.set()
            else:
                self.look_at(*key)
