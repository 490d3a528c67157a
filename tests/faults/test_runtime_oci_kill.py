"""An OCI runtime, or the shim that runs it, is killed at a certain point of create, start, exec, delete and pause.

A runtime that was killed had done what it was asked to, or nothing of it is left, and asking again does it. A shim that
was killed has taken its container with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import pytest_asyncio
from shoal_bus.api import runtime as api
from shoal_bus.errors import Aborted, FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal_bus.message import Request
from shoal_bus.verb import Verb
from shoal_bus.wire import new_id

from tests.support import bundle as bundles
from tests.support import process_table, restarts
from tests.support.gate import RUNTIMES, Gate, shim_above, stopped_below
from tests.support.leaks import cgroups_of
from tests.support.natsd import NatsServer
from tests.support.orphans import Orphans, in_place_of_init
from tests.support.runtime import LIFE, RuntimeNode, runtime_node

VICTIMS = ["runtime", "shim"]
DELAYS = [0.0, 0.002, 0.004, 0.006, 0.009, 0.012, 0.016, 0.02]


ended: dict[str, list[str]] = {}
"""The containers whose lives are over, with all that was told of them."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def orphans() -> Iterator[Orphans]:
    with in_place_of_init(set) as adopted:
        yield adopted
        for entry in adopted.living():
            entry.signal()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, orphans: Orphans) -> AsyncIterator[RuntimeNode]:
    directory = tmp_path_factory.mktemp("node")
    with NatsServer(directory / "nats") as natsd:
        async with runtime_node(directory, natsd) as started:
            yield started


@pytest_asyncio.fixture(loop_scope="module")
async def node(shared: RuntimeNode) -> AsyncIterator[RuntimeNode]:
    """A node that the module's tests share; whoever stands still after one, and what it left, is of no other."""
    ended.clear()
    yield shared
    await asyncio.sleep(0.3)  # for what would come twice
    assert {id: shared.topics(id) for id in ended} == ended
    for entry in stopped_below():
        entry.signal()
    await shared.remove_all()


def fresh() -> str:
    return f"c{secrets.token_hex(4)}"


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


async def end(node: RuntimeNode, id: str, topics: list[str], *, left: bool = False) -> None:
    """The rest of a life, and its events; nothing is left of it, unless it is one of several."""
    with suppress(NotFound):  # it is deleted already
        await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id, force=True))
    async with asyncio.timeout(20):
        while node.topics(id)[-1:] != ["/tasks/delete"]:
            await asyncio.sleep(0.01)
    assert node.topics(id) == topics
    ended[id] = topics
    assert left or not node.of_containers()
    assert left or not cgroups(node)
    assert not stopped_below()


def cgroups(node: RuntimeNode) -> list[str]:
    return [str(path) for path in cgroups_of(f"{node.namespace}/*")]


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_create_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    places = ["before create", "createRuntime", "createContainer", "after create"]
    for victim, where in product(VICTIMS, places):
        id, request_id = fresh(), new_id()
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
    for victim, where in product(VICTIMS, places):
        id, request_id = fresh(), new_id()
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
    for victim, where in product(VICTIMS, ["before", "after"]):
        id, request_id = fresh(), new_id()
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
    id = fresh()
    await node.run(id, "sleep", "600")
    for number, delay in enumerate(DELAYS * 2):
        request_id, exec_id = new_id(), f"e{number}"
        request = api.ExecTask(container_id=id, exec_id=exec_id, args=["sleep", "600"], start=True)
        asking = asyncio.create_task(node.client.call(api.TASK_EXEC, request, id=request_id))
        await kill_runtime("exec", delay, asking)
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        if not isinstance(answer, api.Task):
            assert isinstance(answer, Aborted), answer
            async with asyncio.timeout(20):
                while len(await processes(node, id)) > 1:
                    await asyncio.sleep(0.02)
            answer = await node.client.call(api.TASK_EXEC, request, id=request_id)
        found = await processes(node, id)
        assert found.pop(answer.pid) == exec_id
        assert list(found.values()) == [""], found
        await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id, exec_id=exec_id, force=True))


async def test_a_create_killed_at_any_moment_leaves_nothing(node: RuntimeNode) -> None:
    for delay in DELAYS * 2:
        id, request_id = fresh(), new_id()
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
    for victim, where in product(VICTIMS, places):
        id = fresh()
        create = await make(node, id, gate.path, "sh", "-c", "exit 7", poststop=[gate.hook("poststop")])
        await node.client.call(api.TASK_CREATE, create)
        await node.start(id)
        assert (await node.wait(id)).exit_status == 7
        call = node.client.call(api.TASK_DELETE, api.DeleteTask(container_id=id))
        answer = await killed(gate, where, victim, call)
        assert isinstance(answer, api.Exit), (victim, where, answer)
        assert answer.exit_status == 7
        await end(node, id, LIFE)


async def test_a_takedown_killed_midway_is_finished(node: RuntimeNode) -> None:
    """The shim is dead, and the runtime that removes its container is killed, or the service that has it do so."""
    gate = Gate(node.directory, "runc")
    for victim in ("runtime", "service"):
        id = fresh()
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


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_pause_killed_midway_is_undone_or_done(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    id = fresh()
    await node.client.call(api.TASK_CREATE, await make(node, id, gate.path))
    await node.start(id)
    one = api.TaskRequest(container_id=id)
    for where in ("before", "after"):
        for verb, name, status in ((api.TASK_PAUSE, "pause", "paused"), (api.TASK_RESUME, "resume", "running")):
            request_id = new_id()
            answer = await killed(gate, f"{where} {name}", "runtime", node.client.call(verb, one, id=request_id))
            assert isinstance(answer, Aborted) == (where == "before"), answer
            await node.client.call(verb, one, id=request_id)
            task = await node.client.call(api.TASK_GET, api.ProcessRequest(container_id=id))
            assert task.status == status
    paused = ["/tasks/paused", "/tasks/resumed"]
    await end(node, id, [*LIFE[:2], *paused, *paused, *LIFE[2:]])


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_what_is_frozen_ends_with_its_shim_and_with_its_first_process(runtime: str, node: RuntimeNode) -> None:
    gate = Gate(node.directory, runtime)
    for victim in ("shim", "first process"):
        id = fresh()
        task = await node.client.call(api.TASK_CREATE, await make(node, id, gate.path))
        await node.start(id)
        await node.client.call(api.TASK_PAUSE, api.TaskRequest(container_id=id))
        entry = process_table.look(task.pid)
        assert entry is not None
        assert (shim_above(entry)[0] if victim == "shim" else entry).signal()
        if victim == "shim":
            assert (await node.wait(id)).exit_status == 137
        await end(node, id, [*LIFE[:2], "/tasks/paused", *LIFE[2:]])


async def test_a_pod_whose_shim_is_killed_leaves_nothing(node: RuntimeNode) -> None:
    names = [fresh(), fresh()]
    for name in names:
        spec = node.spec(["sleep", "600"]) | {"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}
        await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id=name, spec=spec))
        await node.client.call(api.TASK_CREATE, api.CreateTask(container_id=name, rootfs=bundles.bind(node.rootfs)))
        await node.start(name)
    place = next((node.node.state / "runtime" / "shims").glob("*/shim.json"))
    os.kill(int(json.loads(place.read_text())["pid"]), 9)
    for name in names:
        assert (await node.wait(name)).exit_status == 137
        await end(node, name, LIFE, left=name != names[-1])
    assert not node.of_containers()


async def test_a_restart_whose_runtime_is_killed_is_made_all_the_same(node: RuntimeNode) -> None:
    gate = Gate(node.directory, "runc")
    for where in ("before create", "before start", "before delete"):
        id = fresh()
        create = await make(node, id, gate.path)
        await restarts.update(node, id, restarts.policy("always"))
        task = await node.client.call(api.TASK_CREATE, create)
        await node.start(id)
        gate.close(where)
        entry = process_table.look(task.pid)
        assert entry is not None
        assert entry.signal()
        _, at_work = shim_above(await gate.arrived())
        assert at_work.signal()
        async with asyncio.timeout(60):
            while node.topics(id)[-1] != "/tasks/start" or len(node.topics(id)) < 6:
                await asyncio.sleep(0.05)
        told = node.topics(id)
        assert told[:6] == [*LIFE, *LIFE[:2]] or where == "before start", told
        assert told.count("/tasks/exit") == told.count("/tasks/delete") == told.count("/tasks/create") - 1
        await node.client.call(api.CONTAINER_REMOVE, api.RemoveContainer(id=id, force=True))
