"""An OCI runtime, or the shim that runs it, is killed at a certain point of create, start, exec, delete and pause.

A runtime that was killed had done what it was asked to, or nothing of it is left, and asking again does it. A shim that
was killed has taken its container with it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import Aborted, FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal_bus.message import Request
from shoal_bus.verb import Verb
from shoal_bus.wire import new_id

from tests.support import bundle as bundles
from tests.support import process_table
from tests.support.gate import RUNTIMES, Gate, shim_above, stopped_below
from tests.support.leaks import cgroups_of
from tests.support.natsd import NatsServer
from tests.support.orphans import Orphans, in_place_of_init
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

VICTIMS = ["runtime", "shim"]
DELAYS = [0.0, 0.002, 0.004, 0.006, 0.009, 0.012, 0.016, 0.02]


@pytest.fixture
def orphans() -> Iterator[Orphans]:
    with in_place_of_init(set) as adopted:
        yield adopted
        for entry in adopted.living():
            entry.signal()


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer, orphans: Orphans) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


async def make(node: RuntimeNode, id: str, runtime: str, *args: str, **hooks: list[dict[str, Any]]) -> api.CreateTask:
    """A container's record, and the request that creates its task."""
    spec = node.spec(list(args or ("sleep", "600"))) | {"hooks": hooks}
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=id, spec=spec, runtime=runtime))
    return api.CreateTask(container_id=id, rootfs=bundles.bind(node.rootfs))


async def killed(gate: Gate, where: str, victim: str, call: Awaitable[Any]) -> Any:
    """What a call answers, or the error it ends with, whose runtime or shim is killed at a closed gate."""
    gate.close(where)
    asking = asyncio.ensure_future(call)
    held = await gate.arrived()
    shim, at_work = shim_above(held)
    assert (shim if victim == "shim" else at_work).signal()
    (answer,) = await asyncio.gather(asking, return_exceptions=True)
    return answer


async def finally_(node: RuntimeNode, verb: Verb[Any, Any], request: Request, id: str) -> Any:
    """The answer to a request that is repeated as long as its errors say nothing about it."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await node.client.call(verb, request, id=id)
            except (Aborted, Unavailable):
                await asyncio.sleep(0.05)
            except ShoalError as error:
                return error


async def end(node: RuntimeNode, id: str, topics: list[str]) -> None:
    """The rest of a life, and its events; nothing is left of it."""
    await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id, force=True))
    assert await node.topics_end(id, "/tasks/delete") == topics
    assert not node.of_containers()
    assert not stopped_below()


def cgroups(node: RuntimeNode) -> list[str]:
    return [str(path) for path in cgroups_of(f"{node.namespace}/*")]


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_create_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    places = ["before create", "createRuntime", "createContainer", "after create"]
    for number, (victim, where) in enumerate((victim, where) for victim in VICTIMS for where in places):
        id, request_id = f"c{number}", new_id()
        hooks = {name: [gate.hook(name)] for name in ("createRuntime", "createContainer")}
        create = await make(node, id, gate.path, **hooks)
        call = node.client.call(api.TASK_CREATE, create, id=request_id)
        answer = await killed(gate, where, victim, call)
        if victim == "runtime" and where != "after create":
            assert isinstance(answer, Aborted), (where, answer)
            assert not node.of_containers(), where
            assert not cgroups(node), where
            assert not stopped_below(), where
            with pytest.raises(NotFound):
                await node.client.call(api.TASK_GET, api.ProcessRequest(container_id=id))
            answer = await node.client.call(api.TASK_CREATE, create, id=request_id)
        assert isinstance(answer, api.Task), (victim, where, answer)
        assert answer.status == "created"
        await node.start(id)
        await end(node, id, LIFE)


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_start_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    places = ["before start", "after start", *(["poststart"] if runtime == "crun" else [])]  # runc runs it at create
    for number, (victim, where) in enumerate((victim, where) for victim in VICTIMS for where in places):
        id, request_id = f"c{number}", new_id()
        task = await node.client.call(
            api.TASK_CREATE, await make(node, id, gate.path, poststart=[gate.hook("poststart")])
        )
        start = api.ProcessRequest(container_id=id)
        answer = await killed(gate, where, victim, node.client.call(api.TASK_START, start, id=request_id))
        if victim == "runtime":
            assert isinstance(answer, Aborted) == (where == "before start"), (where, answer)
            answer = await node.client.call(api.TASK_START, start, id=request_id)
            assert (answer.pid, answer.status) == (task.pid, "running")
            assert not stopped_below()
            await end(node, id, LIFE)
            continue
        assert isinstance(answer, Unavailable | NotFound | FailedPrecondition), answer
        assert isinstance(await finally_(node, api.TASK_START, start, request_id), NotFound | FailedPrecondition)
        assert (await node.wait(id)).exit_status == 137
        await end(node, id, [LIFE[0], *LIFE[2:]])


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_an_exec_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    for number, (victim, where) in enumerate((victim, where) for victim in VICTIMS for where in ("before", "after")):
        id, request_id = f"c{number}", new_id()
        await node.client.call(api.TASK_CREATE, await make(node, id, gate.path))
        await node.start(id)
        request = api.ExecTask(container_id=id, exec_id="e", args=["sleep", "600"], start=True)
        call = node.client.call(api.TASK_EXEC, request, id=request_id)
        answer = await killed(gate, f"{where} exec", victim, call)
        exec_events = ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
        if victim == "runtime":
            assert isinstance(answer, Aborted) == (where == "before"), answer
            if where == "before":
                assert len(await processes(node, id)) == 1
            answer = await node.client.call(api.TASK_EXEC, request, id=request_id)
            assert (await processes(node, id))[answer.pid] == "e"
            await end(node, id, [*LIFE[:2], *exec_events, *LIFE[2:]])
            continue
        assert isinstance(answer, Unavailable | NotFound | FailedPrecondition), answer
        assert isinstance(await finally_(node, api.TASK_EXEC, request, request_id), NotFound | FailedPrecondition)
        assert (await node.wait(id)).exit_status == 137
        await end(node, id, LIFE)


async def processes(node: RuntimeNode, id: str) -> dict[int, str]:
    """The processes of a container, once none of them is an OCI runtime's any more, with their execs."""
    async with asyncio.timeout(20):
        while True:
            found = await node.client.call(api.TASK_PIDS, api.TaskRequest(container_id=id))
            entries = [process_table.look(one.pid) for one in found.processes]
            if all(entry is not None and "runc" not in entry.name and not entry.is_zombie for entry in entries):
                return {one.pid: one.exec_id for one in found.processes}
            await asyncio.sleep(0.02)


async def test_an_exec_killed_at_any_moment_leaves_no_process_nobody_knows(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "600")
    for number, delay in enumerate(DELAYS * 2):
        request_id, exec_id = new_id(), f"e{number}"
        request = api.ExecTask(container_id="one", exec_id=exec_id, args=["sleep", "600"], start=True)
        asking = asyncio.create_task(node.client.call(api.TASK_EXEC, request, id=request_id))
        await kill_runtime("exec", delay, asking)
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        if not isinstance(answer, api.Task):
            assert isinstance(answer, Aborted), answer
            async with asyncio.timeout(20):
                while len(await processes(node, "one")) > 1:
                    await asyncio.sleep(0.02)
            answer = await node.client.call(api.TASK_EXEC, request, id=request_id)
        found = await processes(node, "one")
        assert found.pop(answer.pid) == exec_id
        assert list(found.values()) == [""], found
        await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id="one", exec_id=exec_id, force=True))


async def test_a_create_killed_at_any_moment_leaves_nothing(node: RuntimeNode) -> None:
    for number, delay in enumerate(DELAYS * 2):
        id, request_id = f"c{number}", new_id()
        create = await make(node, id, "runc")
        asking = asyncio.create_task(node.client.call(api.TASK_CREATE, create, id=request_id))
        await kill_runtime("create", delay, asking)
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        if not isinstance(answer, api.Task):
            assert isinstance(answer, Aborted), answer
            assert not node.of_containers()
            assert not cgroups(node)
            answer = await node.client.call(api.TASK_CREATE, create, id=request_id)
        assert answer.status == "created"
        await end(node, id, [LIFE[0], *LIFE[2:]])
        assert not cgroups(node)


async def kill_runtime(verb: str, delay: float, asking: asyncio.Future[Any]) -> None:
    """Kills the runc that carries out `verb`, so long after it was first seen; nobody, if it is faster."""
    while not asking.done():
        for entry in process_table.below(os.getpid()):
            if entry.name == "runc" and verb in entry.arguments:
                await asyncio.sleep(delay)
                entry.signal()
                return
        await asyncio.sleep(0)


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_delete_killed_midway_is_done_all_the_same(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    places = ["before delete", "poststop", "after delete"]
    for number, (victim, where) in enumerate((victim, where) for victim in VICTIMS for where in places):
        id = f"c{number}"
        create = await make(node, id, gate.path, "sh", "-c", "exit 7", poststop=[gate.hook("poststop")])
        await node.client.call(api.TASK_CREATE, create)
        await node.start(id)
        assert (await node.wait(id)).exit_status == 7
        call = node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id))
        answer = await killed(gate, where, victim, call)
        assert isinstance(answer, api.Exit), (victim, where, answer)
        assert answer.exit_status == 7
        assert await node.topics_end(id, "/tasks/delete") == LIFE
        assert not node.of_containers(), (victim, where)
        assert not cgroups(node), (victim, where)
        assert not stopped_below(), (victim, where)


async def test_a_takedown_killed_midway_is_finished(node: RuntimeNode) -> None:
    """The shim is dead, and the runtime that removes its container is killed, or the service that has it do so."""
    gate = Gate(node.directory, "runc")
    for number, victim in enumerate(["runtime", "service"]):
        id = f"c{number}"
        task = await node.client.call(api.TASK_CREATE, await make(node, id, gate.path))
        await node.start(id)
        gate.close("before delete")
        entry = process_table.look(task.pid)
        assert entry is not None
        assert shim_above(entry)[0].signal()
        held = await gate.arrived()
        if victim == "service":
            node.copy().kill()
        held.signal()
        if victim == "service":
            await asyncio.to_thread(node.copy().start)
        assert (await node.wait(id)).exit_status == 137
        await end(node, id, LIFE)
        assert not cgroups(node)


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_pause_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    await node.client.call(api.TASK_CREATE, await make(node, "one", gate.path))
    await node.start("one")
    one = api.TaskRequest(container_id="one")
    for where in ("before", "after"):
        for verb, name, status in ((api.TASK_PAUSE, "pause", "paused"), (api.TASK_RESUME, "resume", "running")):
            request_id = new_id()
            answer = await killed(gate, f"{where} {name}", "runtime", node.client.call(verb, one, id=request_id))
            assert isinstance(answer, Aborted) == (where == "before"), answer
            await node.client.call(verb, one, id=request_id)
            task = await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one"))
            assert task.status == status
    paused = ["/tasks/paused", "/tasks/resumed"]
    await end(node, "one", [*LIFE[:2], *paused, *paused, *LIFE[2:]])


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_what_is_frozen_ends_with_its_shim_and_with_its_first_process(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    for victim in ("shim", "first process"):
        id = "frozen-" + victim.partition(" ")[0]
        task = await node.client.call(api.TASK_CREATE, await make(node, id, gate.path))
        await node.start(id)
        await node.client.call(api.TASK_PAUSE, api.TaskRequest(container_id=id))
        entry = process_table.look(task.pid)
        assert entry is not None
        assert (shim_above(entry)[0] if victim == "shim" else entry).signal()
        if victim == "shim":
            assert (await node.wait(id)).exit_status == 137
        await end(node, id, [*LIFE[:2], "/tasks/paused", *LIFE[2:]])
        assert not cgroups(node)


async def test_a_pod_whose_shim_is_killed_leaves_nothing(node: RuntimeNode) -> None:
    for name in ("a", "b"):
        spec = node.spec(["sleep", "600"]) | {"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}
        await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=name, spec=spec))
        await node.client.call(api.TASK_CREATE, api.CreateTask(container_id=name, rootfs=bundles.bind(node.rootfs)))
        await node.start(name)
    place = next((node.node.state / "runtime" / "shims").glob("*/shim.json"))
    os.kill(int(json.loads(place.read_text())["pid"]), 9)
    for name in ("a", "b"):
        assert (await node.wait(name)).exit_status == 137
        await node.delete(name)
        assert await node.topics_end(name, "/tasks/delete") == LIFE
    assert not node.of_containers()
