"""The runtime service's side of supervision: finds shims, asks for new ones, hears of exits.

Shims outlive this process; every copy of the service is connected to every shim of the node. An exit may therefore be
heard by several copies, and more than once: recording it is a compare-and-set of the service's database.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from shoal_bus.errors import (
    AlreadyExists,
    NotFound,
    ShoalError,
    Unavailable,
)
from shoal_bus.locks import Locks
from shoal_bus.types import Mount, Stdio

from shoal_runtime.connection import CALL_SECONDS, ShimConnection
from shoal_runtime.dead_shims import DeadShims
from shoal_runtime.grace import GracePeriod
from shoal_runtime.runtimes import require_runtime
from shoal_runtime.shim import protocol, specification
from shoal_runtime.shims import ExitRecord, Found, exit_record, place_of
from shoal_runtime.turns import Turns
from shoal_runtime.zygotes import ZygoteKeeper

log = structlog.get_logger(__name__)

_WATCH_SECONDS = 1.0


class Supervisor:
    """Every shim of the node, as one copy of the service sees them. `state` is the service's state directory."""

    def __init__(
        self,
        state: Path,
        locks: Locks,
        on_exit: Callable[[ExitRecord], None],
        on_oom: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        """`on_oom` is called with namespace, id and the number of OOM kills so far."""
        self._state, self._locks, self._on_exit, self._on_oom = state, locks, on_exit, on_oom
        self._places = state / "shims"
        self._zygote = ZygoteKeeper(state)
        self._dead = DeadShims(self._places, locks, on_exit)
        self._shims: dict[str, ShimConnection] = {}
        self._turns = Turns(max(8, 4 * (os.cpu_count() or 1)))
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._grace_period = GracePeriod()

    # -------------------------------------------------------------------------------------------------- start and stop

    async def start(self) -> list[Found]:
        """Finds the shims that run and takes down what dead ones left; exits that happened meanwhile are told."""
        self._places.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._zygote.want()
        await self._dead.sweep_half_made()
        found = [
            entry
            for name in sorted(p.name for p in self._places.iterdir())
            if (entry := await self._find(name)) is not None
        ]
        self._spawn(self._watch())
        return found

    async def close(self) -> None:
        """Disconnects. Shims and containers go on."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for shim in list(self._shims.values()):
            await shim.close()
        await self._zygote.close()
        await self._grace_period.close()

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find(self, name: str) -> Found | None:
        """Connects to the shim of a directory, or takes down what it left."""
        if "." in name:
            return None  # one that is just being made, or a group's
        record = protocol.read_json(str(self._places / name), protocol.RECORD)
        if record is None:
            await self._dead.sweep(name)  # it died while it removed everything, and had got so far
            return None
        try:
            hello = (await self._connected(name)).hello
        except (OSError, ShoalError):
            try:
                exit = await self._dead.take_down(name)
            except Exception as error:  # one container is no reason not to start
                foreseen = isinstance(error, ShoalError)
                log.warning("shim.not_found", container=record["id"], error=str(error), exc_info=not foreseen)
                return None
            return Found(record["namespace"], record["id"], exit.pid, "dead", record["bundle"]) if exit else None
        return Found(hello["namespace"], hello["id"], hello["pid"], hello["status"], record["bundle"])

    async def _watch(self) -> None:
        """Hears of shims that other copies ask for, so that their exits are heard here too."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for name in [place.name for place in self._places.iterdir()]:
                if name in self._shims or "." in name:
                    continue
                try:
                    await self._find_living(name)
                except (OSError, ShoalError) as error:
                    log.debug("shim.not_found", name=name, error=str(error))
                except Exception:
                    log.exception("shim.not_found", name=name)  # the others are looked for all the same

    async def _find_living(self, name: str) -> None:
        exit = protocol.read_json(str(self._places / name), protocol.EXIT)
        if exit is not None and exit.get("taken_down"):
            return
        try:
            await self._connected(name)
        except ConnectionRefusedError:
            await self._dead.take_down(name)

    # ------------------------------------------------------------------------------------------------------ operations

    async def create(
        self,
        namespace: str,
        id: str,
        *,
        bundle: Path,
        rootfs: list[Mount],
        runtime: str,
        stdio: Stdio,
        request_id: str = "",
        options: dict[str, Any] | None = None,
        group: str = "",
        checkpoint: str = "",
    ) -> int:
        """A shim, and the container created in it; returns its first process's pid.

        Containers of one `group` share a shim. With `checkpoint`, starting it restores it from that directory. With
        the `request_id` of an earlier call whose caller died, it answers what that one made. Everything is undone
        when it fails: FAILED_PRECONDITION with the OCI runtime's own words, or when there is no such runtime.
        """
        name = place_of(namespace, id)
        if (self._places / name).exists() and (pid := await self._created_before(name, id, request_id)) is not None:
            return pid
        self._grace_period.begin()
        options, binary = options or {}, require_runtime(runtime)
        root = Path(options.get("root") or self._state / "oci") / namespace
        request = {
            "op": "create", "n": 1, "place": name, "namespace": namespace, "id": id, "bundle": str(bundle),
            "runtime": binary, "runtime_root": str(root), "rootfs": [mount.model_dump() for mount in rootfs],
            "stdio": stdio.model_dump(), "request_id": request_id, "options": options, "checkpoint": checkpoint,
            "group": place_of(namespace, f"group/{group}") if group else "",
            "facts": specification.facts(protocol.read_json(str(bundle), "config.json") or {}),
        }  # fmt: skip
        if not group:
            async with self._turns.turn():
                return await self._create(name, id, request)
        async with self._locks.hold(f"shim-group {request['group']}"):
            return await self._create(name, id, request)

    async def _create(self, name: str, id: str, request: dict[str, Any]) -> int:
        shim = await self._reach_maker(name, request["group"])
        request_id = request["request_id"]
        self._shims[name] = shim
        try:
            reply = await shim.ask(request)
        except AlreadyExists:
            # The zygote was asked by a copy that died right after: its shim is the one.
            await shim.close()
            pid = await self._created_before(name, id, request_id)
            if pid is None:
                raise
            return pid
        except BaseException:
            await shim.close()
            await self._dead.sweep_half_made(name)
            raise
        return int(reply["pid"])

    async def _reach_maker(self, name: str, group: str) -> ShimConnection:
        """Who makes a container: the shim of its group where there is one, or the zygote."""
        if group:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                place = str(self._places / (group + protocol.GROUP))
                return await ShimConnection.connect(self, name, place, protocol.SOCKET)
        await self._zygote.want()
        state = str(self._state)
        return await self._zygote.reach(lambda: ShimConnection.connect(self, name, state, protocol.SHIM_SOCKET))

    async def _created_before(self, name: str, id: str, request_id: str) -> int | None:
        """The pid an earlier call of this request made; None when nothing is left of it. ALREADY_EXISTS if alive."""
        record = protocol.read_json(str(self._places / name), protocol.RECORD)
        ours = record is not None and request_id and record["request_id"] == request_id
        with suppress(OSError, Unavailable, NotFound):
            shim = await self._connected(name)
            if not ours:
                raise AlreadyExists(f"container {id}: has a task already", hint="delete it first")
            for _ in range(int(CALL_SECONDS / 0.02)):
                state = await shim.ask({"op": "state"})
                if state["status"] != "creating":
                    return int(state["pid"])
                await asyncio.sleep(0.02)
        await self._dead.take_down(name)
        await self._dead.sweep(name)
        return None

    async def start_task(self, namespace: str, id: str) -> int:
        """Starts a created container, or restores it from its checkpoint; its first process's pid."""
        return int((await self._ask(namespace, id, {"op": "start"}))["pid"])

    async def exec(
        self, namespace: str, id: str, exec_id: str, *, process: dict[str, Any], stdio: Stdio, request_id: str
    ) -> int:
        """Starts a further process in a container; its pid. The same request again gets the same answer."""
        self._grace_period.begin()
        request = {
            "op": "exec", "exec": exec_id, "process": process, "stdio": stdio.model_dump(), "request_id": request_id,
        }  # fmt: skip
        return int((await self._ask(namespace, id, request))["pid"])

    async def kill(
        self, namespace: str, id: str, signal: int, all: bool, exec_id: str = "", *, request_id: str = ""
    ) -> None:
        """Sends a signal to a process, or to all. NOT_FOUND when it has finished, unless by this same request."""
        await self._ask(
            namespace, id, {"op": "kill", "signal": signal, "all": all, "exec": exec_id, "request_id": request_id}
        )

    async def pause(self, namespace: str, id: str) -> None:
        """Freezes a running container."""
        await self._ask(namespace, id, {"op": "pause"})

    async def resume(self, namespace: str, id: str) -> None:
        """Thaws a paused one."""
        await self._ask(namespace, id, {"op": "resume"})

    async def update(self, namespace: str, id: str, resources: dict[str, Any]) -> None:
        """Sets a container's limits (OCI's `linux.resources`)."""
        await self._ask(namespace, id, {"op": "update", "resources": resources})

    async def checkpoint(self, namespace: str, id: str, path: str, flags: Sequence[str]) -> None:
        """Writes a container to a directory by CRIU; `flags` are the runtime's. FAILED_PRECONDITION if it can't be."""
        await self._ask(namespace, id, {"op": "checkpoint", "path": path, "flags": list(flags)})

    async def resize(self, namespace: str, id: str, width: int, height: int, exec_id: str = "") -> None:
        """Sets the terminal's size in characters. FAILED_PRECONDITION without a terminal."""
        await self._ask(namespace, id, {"op": "resize", "width": width, "height": height, "exec": exec_id})

    async def close_stdin(self, namespace: str, id: str, exec_id: str = "") -> None:
        """The process reads end of file."""
        await self._ask(namespace, id, {"op": "close_stdin", "exec": exec_id})

    async def state(self, namespace: str, id: str, exec_id: str = "") -> dict[str, Any]:
        """The shim's word: `status` (creating, created, running, paused, stopped) and `pid`."""
        return await self._ask(namespace, id, {"op": "state", "exec": exec_id})

    async def delete_exec(self, namespace: str, id: str, exec_id: str, force: bool = False) -> ExitRecord:
        """Forgets an exec that has ended, once its last words are out, and says how; `force` kills what still runs."""
        reply = await self._ask(namespace, id, {"op": "delete_exec", "exec": exec_id, "force": force})
        return exit_record(namespace, id, reply["exit"], exec_id)

    async def delete(self, namespace: str, id: str, force: bool = False) -> ExitRecord | None:
        """Removes the container and everything made for it, its shim last; how it ended, or None if nothing was there.

        FAILED_PRECONDITION while it runs, without `force`. What a dead shim left is removed too.
        """
        name = place_of(namespace, id)
        if not (self._places / name).exists():
            await self._dead.sweep_half_made(name)
            return None
        record: ExitRecord | None
        try:
            shim = await self._connected(name)
            reply = await shim.ask({"op": "delete", "force": force})
            record = exit_record(namespace, id, reply["exit"])
        except (OSError, Unavailable):
            group = (protocol.read_json(str(self._places / name), protocol.RECORD) or {}).get("group")
            record = await self._dead.take_down(name)
            if group:
                await self._dead.sweep_group(group)
            await self._dead.sweep_half_made(name)
        await self._dead.sweep(name)
        return record

    async def _ask(self, namespace: str, id: str, request: dict[str, Any]) -> dict[str, Any]:
        name = place_of(namespace, id)
        try:
            shim = await self._connected(name)
        except FileNotFoundError:
            raise NotFound(f"container {id}: has no running task") from None
        except OSError:
            await self._dead.take_down(name)
            raise NotFound(f"container {id}: its shim is dead, and so is it") from None
        return await shim.ask(request)

    # ----------------------------------------------------------------------------------------------------- connections

    async def _connected(self, name: str) -> ShimConnection:
        shim = self._shims.get(name)
        if shim is not None and not shim.closed:
            await shim.greeted()
            return shim
        shim = await ShimConnection.connect(self, name, str(self._places / name), protocol.SOCKET)
        again = self._shims.get(name)
        if again is not None and not again.closed:
            await shim.close()
            await again.greeted()
            return again
        self._shims[name] = shim
        await shim.greeted()
        return shim

    def exited(self, hello: dict[str, Any], event: dict[str, Any]) -> None:
        """A shim told of an exit."""
        self._on_exit(exit_record(hello["namespace"], hello["id"], event, event.get("exec", "")))

    def out_of_memory(self, hello: dict[str, Any], event: dict[str, Any]) -> None:
        """A shim told how many OOM kills there have been."""
        self._on_oom(hello["namespace"], hello["id"], int(event["kills"]))

    def lost(self, shim: ShimConnection, orderly: bool) -> None:
        """A shim's connection has ended: orderly, or because it is dead."""
        if self._shims.get(shim.name) is shim:
            del self._shims[shim.name]
        if not orderly and not self._closed:
            self._spawn(self._after_loss(shim.name))

    async def _after_loss(self, name: str) -> None:
        try:
            await self._connected(name)
        except FileNotFoundError:
            return  # it had made nothing yet, or has removed everything
        except (OSError, ShoalError):
            with suppress(Unavailable):  # it is there again, made anew, and `_watch` finds it
                await self._dead.take_down(name)
