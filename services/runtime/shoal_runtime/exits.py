"""Exits: recorded once by whichever copy hears of one first, in order with what came before; and who waits for them.

`/tasks/exit` comes after `/tasks/create` and `/tasks/start`, also when the process is gone before those have been
written: an exit heard while a create or start is under way is kept in the row, and told by the transaction that tells
of the create or start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog
from shoal_bus.api import runtime as api
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import NotFound
from shoal_bus.message import Message

from shoal_runtime.shims import ExitRecord

log = structlog.get_logger(__name__)

KILLED = 137
KEEP_SECONDS = 900.0
_LOOK_AGAIN_SECONDS = 1.0
_TRY_AGAIN_SECONDS = 1.0


class ExitHeard(Message):
    """What the copies of the service tell one another of an exit."""

    namespace: str
    exit: api.Exit


class Exits:
    """The exits of every task. `tell` passes an exit on to all copies of the service, this one included."""

    def __init__(self, database: Database, tell: Callable[[ExitHeard], None]) -> None:
        self._db, self._tell = database, tell
        self._waiting: dict[tuple[str, str, str], set[asyncio.Future[api.Exit]]] = {}
        self._retries: set[asyncio.Task[None]] = set()
        self._on_recorded: list[Callable[[str, api.Exit], None]] = []

    def on_recorded(self, callback: Callable[[str, api.Exit], None]) -> None:
        """Calls `callback` with the namespace and the exit after each one that this copy has recorded."""
        self._on_recorded.append(callback)

    def heard(self, record: ExitRecord) -> None:
        """Records an exit, as often as it may be told; a database that can't take it now is tried until it can."""
        try:
            with self._db.write() as tx:
                recorded = self.record(tx, record)
        except Exception:
            log.exception("exit.unrecorded", container=record.id, exit_status=record.exit_status)
            retry = asyncio.get_running_loop().create_task(self._again(record))
            self._retries.add(retry)
            retry.add_done_callback(self._retries.discard)
            return
        if recorded is not None:
            self.announce(record.namespace, recorded)

    async def _again(self, record: ExitRecord) -> None:
        await asyncio.sleep(_TRY_AGAIN_SECONDS)
        self.heard(record)

    def record(self, tx: Transaction, exit: ExitRecord) -> api.Exit | None:
        """Marks a process as stopped and emits its event, if that is new and its turn; the exit, if it is told now."""
        row = _find(tx, exit.namespace, exit.id, exit.exec_id)
        if row is None or row["status"] == "stopped" or (row["pid"] and exit.pid and row["pid"] != exit.pid):
            return None
        tx.execute(
            "UPDATE tasks SET exit_pid = ?, exit_status = ?, exited_at = ?"
            " WHERE namespace = ? AND id = ? AND exec_id = ?",
            (exit.pid or row["pid"], exit.exit_status, exit.exited_at.timestamp(),
             exit.namespace, exit.id, exit.exec_id),
        )  # fmt: skip
        if _is_untold(row):
            return None  # whoever creates or starts it tells
        return self.settle(tx, exit.namespace, exit.id, exit.exec_id)

    def settle(self, tx: Transaction, namespace: str, id: str, exec_id: str = "") -> api.Exit | None:
        """Tells of what waits in a row whose create and start are told: OOM kills, and an exit. The exit, if any."""
        row = _find(tx, namespace, id, exec_id)
        if row is None or row["status"] == "stopped":
            return None
        if row["oom_kills"] > row["oom_told"]:
            tx.execute(
                "UPDATE tasks SET oom_told = oom_kills WHERE namespace = ? AND id = ? AND exec_id = ''", (namespace, id)
            )
            tx.emit(namespace, api.TASKS_OOM, api.TaskOOM(container_id=id))
        if row["exited_at"] is None or (row["exit_pid"] and row["exit_pid"] != row["pid"]):
            return None  # none, or of an earlier task of that name
        tx.execute(
            "UPDATE tasks SET status = 'stopped' WHERE namespace = ? AND id = ? AND exec_id = ?",
            (namespace, id, exec_id),
        )
        exit = exit_of(row)
        event = api.TaskExited(
            container_id=id, id=exec_id or id, pid=exit.pid, exit_status=exit.exit_status, exited_at=exit.exited_at
        )
        tx.emit(namespace, api.TASKS_EXIT, event)
        return exit

    def out_of_memory(self, namespace: str, id: str, kills: int) -> None:
        """The kernel has killed processes of a container for its memory limit, `kills` of them so far: told once."""
        try:
            with self._db.write() as tx:
                row = _find(tx, namespace, id, "")
                if row is None or row["oom_kills"] >= kills:
                    return
                tx.execute(
                    "UPDATE tasks SET oom_kills = ? WHERE namespace = ? AND id = ? AND exec_id = ''",
                    (kills, namespace, id),
                )
                if not _is_untold(row):
                    self.settle(tx, namespace, id)
        except Exception:
            log.exception("oom.unrecorded", container=id)  # the shim says it again when it is asked who it is

    def announce(self, namespace: str, exit: api.Exit) -> None:
        """After the transaction: wakes who waits, here and in the other copies."""
        heard = ExitHeard(namespace=namespace, exit=exit)
        self.wake(heard)
        self._tell(heard)
        for callback in self._on_recorded:
            callback(namespace, exit)

    def wake(self, heard: ExitHeard) -> None:
        """Gives an exit to who waits for it in this copy."""
        key = (heard.namespace, heard.exit.container_id, heard.exit.exec_id)
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(heard.exit)

    async def wait(self, namespace: str, id: str, exec_id: str = "", pid: int = 0) -> api.Exit:
        """The exit of a process, once there is one. NOT_FOUND without it, unless a run's was removed lately.

        With a `pid` only that process counts: one that has taken its place since, by a restart policy, doesn't.
        """
        key = (namespace, id, exec_id)
        while True:
            row = self._db.read_one("SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ?", key)
            if row is None and exec_id:
                raise NotFound(f"container {id}: has no exec {exec_id}")
            if row is None:
                return self._kept(namespace, id, pid)
            if pid and row["pid"] not in (0, pid):
                raise NotFound(f"container {id}: process {pid} is gone, and another one is in its place")
            if row["status"] == "stopped":
                return exit_of(row)
            future: asyncio.Future[api.Exit] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(key, set()).add(future)
            try:
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    exit = await future
                if not pid or exit.pid == pid:
                    return exit
            except TimeoutError:
                continue
            finally:
                waiting = self._waiting.get(key)
                if waiting is not None:
                    waiting.discard(future)
                    if not waiting:
                        del self._waiting[key]

    def keep(self, tx: Transaction, namespace: str, exit: api.Exit) -> None:
        """Remembers the exit of a task that is removed without anybody having asked, for who asks within 15 minutes."""
        tx.execute(
            "INSERT OR REPLACE INTO exits VALUES (?, ?, ?, ?, ?, ?)",
            (namespace, exit.container_id, exit.pid, exit.exit_status, exit.exited_at.timestamp(),
             time.time() + KEEP_SECONDS),
        )  # fmt: skip

    @staticmethod
    def forget(tx: Transaction, namespace: str, id: str) -> None:
        """Forgets a kept exit: the name is used anew. Those that nobody will ask for go, too."""
        tx.execute("DELETE FROM exits WHERE (namespace = ? AND id = ?) OR kept_until < ?", (namespace, id, time.time()))

    def _kept(self, namespace: str, id: str, pid: int) -> api.Exit:
        row = self._db.read_one(
            "SELECT *, pid AS exit_pid, '' AS exec_id FROM exits WHERE namespace = ? AND id = ? AND kept_until > ?",
            (namespace, id, time.time()),
        )
        if row is None or (pid and row["pid"] != pid):
            raise NotFound(f"container {id}: has no task")
        return exit_of(row)


def _find(tx: Transaction, namespace: str, id: str, exec_id: str) -> Any | None:
    return tx.execute(
        "SELECT * FROM tasks WHERE namespace = ? AND id = ? AND exec_id = ?", (namespace, id, exec_id)
    ).fetchone()


def _is_untold(row: Any) -> bool:
    """Whether its create or its start is still under way: what comes after them is told after them."""
    return bool(row["status"] == "creating" or (row["status"] == "created" and row["start_request"]))


def exit_of(row: Any) -> api.Exit:
    """The exit a row holds."""
    return api.Exit(
        container_id=row["id"], exec_id=row["exec_id"], pid=row["exit_pid"] or row["pid"],
        exit_status=row["exit_status"] or 0,
        exited_at=datetime.fromtimestamp(row["exited_at"] or 0.0, UTC),
    )  # fmt: skip
