"""What is done to a running task over the bus: pause, limits, checkpoints, OOM kills, log programs, runtimes, pods."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from shoal_bus.types import Stdio

from tests.support import bundle as bundles
from tests.support.natsd import NatsServer
from tests.support.runtime import LIFE, RuntimeNode, runtime_node


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd) as started:
        yield started


VERBS = {"create", "start", "exec", "delete"}


def script(path: Path, text: str) -> str:
    """A program of the test's own."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def create(
    node: RuntimeNode, id: str, *args: str, limits: dict[str, object] | None = None, **more: object
) -> None:
    spec = node.spec(list(args))
    spec["linux"]["resources"] = limits or {}
    spec["annotations"] = more.pop("annotations", {})
    request = api.CreateContainer.model_validate({"id": id, "spec": spec} | more)
    await node.client.call(api.CONTAINER_CREATE, request)


async def begin(node: RuntimeNode, id: str, **more: object) -> api.Task:
    request = {"container_id": id, "rootfs": [mount.model_dump() for mount in bundles.bind(node.rootfs)]} | more
    await node.client.call(api.TASK_CREATE, api.CreateTask.model_validate(request))
    return await node.start(id)


async def status(node: RuntimeNode, id: str) -> str:
    return (await node.client.call(api.TASK_GET, api.ProcessRequest(container_id=id))).status


def shims(node: RuntimeNode) -> set[int]:
    places = (node.node.state / "runtime" / "shims").glob("*/shim.json")
    return {int(json.loads(place.read_text())["pid"]) for place in places}


async def test_a_paused_task_stands_still_until_it_is_resumed_or_killed(node: RuntimeNode) -> None:
    output = node.directory / "out"
    await node.container("one", "sh", "-c", "while :; do echo tick; sleep 0.05; done")
    await begin(node, "one", stdio=Stdio(stdout=f"file://{output}").model_dump())
    one = api.TaskRequest(container_id="one")
    await node.client.call(api.TASK_PAUSE, one)
    assert await status(node, "one") == "paused"
    size = output.stat().st_size
    await asyncio.sleep(0.4)
    assert output.stat().st_size == size
    with pytest.raises(FailedPrecondition, match="paused"):
        await node.client.call(api.TASK_PAUSE, one)
    with pytest.raises(FailedPrecondition, match="paused"):
        await node.client.call(api.TASK_EXEC, api.ExecTask(container_id="one", exec_id="e", args=["true"]))
    await node.client.call(api.TASK_RESUME, one)
    with pytest.raises(FailedPrecondition, match="running"):
        await node.client.call(api.TASK_RESUME, one)
    while output.stat().st_size == size:
        await asyncio.sleep(0.02)
    await node.client.call(api.TASK_PAUSE, one)
    await node.kill("one")
    assert (await node.wait("one")).exit_status == 137
    await node.delete("one")
    assert await node.topics_end("one", "/tasks/delete") == [
        *LIFE[:2], "/tasks/paused", "/tasks/resumed", "/tasks/paused", *LIFE[2:],
    ]  # fmt: skip


async def test_a_running_task_is_deleted_by_force_and_says_how_it_ended(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    exit = await node.client.call(api.TASK_DELETE, api.DeleteTask(container_id="one", force=True))
    assert exit.exit_status == 137
    assert await node.topics_end("one", "/tasks/delete") == LIFE


async def test_limits_are_changed_while_it_runs(node: RuntimeNode) -> None:
    await create(node, "one", "sleep", "60", limits={"memory": {"limit": 64 << 20}, "pids": {"limit": 50}})
    task = await begin(node, "one")
    change = {"memory": {"limit": 48 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 50_000, "period": 100_000}}
    await node.client.call(api.TASK_UPDATE, api.UpdateTask(container_id="one", resources=change))
    paths = {
        controller: path
        for line in Path(f"/proc/{task.pid}/cgroup").read_text().splitlines()
        for controller, path in [line.split(":", 2)[1:]]
    }
    root = Path("/sys/fs/cgroup")
    if "memory" in paths:
        found = [
            (root / "memory" / paths["memory"][1:] / "memory.limit_in_bytes").read_text(),
            (root / "pids" / paths["pids"][1:] / "pids.max").read_text(),
        ]
    else:
        found = [(root / paths[""][1:] / name).read_text() for name in ("memory.max", "pids.max")]
    assert [int(text) for text in found] == [48 << 20, 20]
    # The container has them, too: a next task begins with them.
    container = await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
    assert container.spec["linux"]["resources"] == change
    await node.client.call(
        api.TASK_UPDATE, api.UpdateTask(container_id="one", resources={"pids": {"limit": 30}, "cpu": {"shares": 512}})
    )
    container = await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
    change |= {"pids": {"limit": 30}, "cpu": {**change["cpu"], "shares": 512}}
    assert container.spec["linux"]["resources"] == change
    with pytest.raises(FailedPrecondition):
        await node.client.call(
            api.TASK_UPDATE, api.UpdateTask(container_id="one", resources={"memory": {"limit": 4096}})
        )
    container = await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
    assert container.spec["linux"]["resources"] == change
    with pytest.raises(InvalidArgument):
        await node.client.call(
            api.TASK_UPDATE, api.UpdateTask(container_id="one", resources={"memory": {"limit": "x"}})
        )
    with pytest.raises(NotFound):
        await node.client.call(api.TASK_UPDATE, api.UpdateTask(container_id="nobody", resources=change))


async def test_an_oom_kill_is_told_once_and_before_the_exit(node: RuntimeNode) -> None:
    eat = "busybox dd if=/dev/zero of=/dev/null bs=128M count=1"
    await create(node, "child", "sh", "-c", f"{eat}; exit 3", limits={"memory": {"limit": 32 << 20, "swap": 32 << 20}})
    await create(node, "first", *eat.split(), limits={"memory": {"limit": 32 << 20, "swap": 32 << 20}})
    await begin(node, "child")
    assert (await node.wait("child")).exit_status == 3
    await begin(node, "first")
    assert (await node.wait("first")).exit_status == 137
    node.copy().kill()  # the next copy hears of it again, and doesn't tell again
    node.copy().start()
    for id in ("child", "first"):
        await node.delete(id)
        assert await node.topics_end(id, "/tasks/delete") == [*LIFE[:2], "/tasks/oom", *LIFE[2:]]


async def test_a_checkpoint_says_what_criu_says_and_leaves_nothing(node: RuntimeNode) -> None:
    await node.run("one", "sleep", "60")
    place = node.directory / "checkpoint"
    with pytest.raises(FailedPrecondition, match="checkpoint"):
        await node.client.call(api.TASK_CHECKPOINT, api.CheckpointTask(container_id="one", path=str(place)), timeout=60)
    assert not place.exists()
    assert await status(node, "one") == "running"
    with pytest.raises(InvalidArgument, match="absolute"):
        await node.client.call(api.TASK_CHECKPOINT, api.CheckpointTask(container_id="one", path="relative"))
    await node.container("two", "true")
    with pytest.raises(NotFound, match="no such directory"):
        await begin(node, "two", checkpoint=str(place))
    place.mkdir()
    create_it = api.CreateTask(container_id="two", rootfs=bundles.bind(node.rootfs), checkpoint=str(place))
    assert (await node.client.call(api.TASK_CREATE, create_it)).pid == 0
    with pytest.raises(FailedPrecondition, match="restore"):
        await node.start("two")
    await node.delete("two")


async def test_a_log_program_gets_all_of_both_streams(node: RuntimeNode) -> None:
    log = node.directory / "log"
    program = script(
        node.directory / "logger",
        f'echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >{log}.names\n'
        f"exec 5>&-\ncat <&4 >{log}.err &\nexec 4<&-\ncat <&3 >{log}.out\nwait\necho done >>{log}.names",
    )
    await node.container("one", "sh", "-c", "busybox seq 1 200000; echo oops >&2")
    await begin(node, "one", stdio=Stdio(stdout=f"binary://{program}?tag=x&level=2").model_dump())
    assert (await node.wait("one")).exit_status == 0
    await node.delete("one")
    assert Path(f"{log}.names").read_text() == f"{node.namespace} one tag x level 2\ndone\n"
    assert Path(f"{log}.out").read_text().splitlines()[-1] == "200000"
    assert Path(f"{log}.err").read_text() == "oops\n"
    await node.container("two", "true")
    with pytest.raises(FailedPrecondition, match="log program"):
        await begin(node, "two", stdio=Stdio(stdout="binary:///no/such/program").model_dump())
    assert [found for found in node.of_containers() if "two" in found] == []


async def test_a_pod_s_containers_share_a_shim_and_nothing_else(node: RuntimeNode) -> None:
    group = {"io.kubernetes.cri.sandbox-id": "pod-1"}
    ids = [f"c{number}" for number in range(4)]
    for id in ids:
        await create(node, id, "sleep", "60", annotations=group)
    await asyncio.gather(*(begin(node, id) for id in ids))
    assert len(shims(node)) == 1
    await node.kill("c0")
    assert (await node.wait("c0")).exit_status == 137
    await node.delete("c0")
    node.copy().kill()
    node.copy().start()
    assert [await status(node, id) for id in ids[1:]] == ["running"] * 3
    await create(node, "c4", "sleep", "60", annotations=group)
    await begin(node, "c4")
    (shim,) = shims(node)
    os.kill(shim, 9)
    for id in [*ids[1:], "c4"]:
        assert (await node.wait(id)).exit_status == 137
    await create(node, "again", "sh", "-c", "exit 6", annotations=group)
    await begin(node, "again")
    assert (await node.wait("again")).exit_status == 6
    for id in [*ids[1:], "c4", "again"]:
        await node.delete(id)
        assert await node.topics_end(id, "/tasks/delete") == LIFE
    assert list((node.node.state / "runtime" / "shims").iterdir()) == []


@pytest.mark.parametrize("name", ["crun", "my-crun"])
async def test_crun_by_path_supervised_the_same_way(name: str, node: RuntimeNode) -> None:
    # crun refuses a hybrid machine whose cgroup v2 has a controller; where it isn't mounted, there is v1 alone.
    hidden = "umount /sys/fs/cgroup/unified 2>/dev/null"
    calls = node.directory / "calls"
    crun = script(
        node.directory / name, f'echo "$*" >>{calls}; exec unshare -m sh -c \'{hidden}; exec crun "$@"\' crun "$@"'
    )
    output = node.directory / "out"
    await create(node, "one", "sh", "-c", "echo hello; sleep 0.2; exit 7", runtime=crun)
    await begin(node, "one", stdio=Stdio(stdout=f"file://{output}").model_dump())
    request = api.ExecTask(container_id="one", exec_id="e", args=["sh", "-c", "exit 5"], start=True)
    await node.client.call(api.TASK_EXEC, request)
    waited = await node.client.call(api.TASK_WAIT, api.ProcessRequest(container_id="one", exec_id="e"))
    assert waited.exit_status == 5
    assert (await node.wait("one")).exit_status == 7
    await node.delete("one")
    assert output.read_text() == "hello\n"
    verbs = [verb for line in calls.read_text().splitlines() for verb in VERBS & set(line.split())]
    # By its own name, it isn't started for what is done without it.
    assert verbs == (["create", "exec"] if name == "crun" else ["create", "start", "exec", "delete"])
    await create(node, "two", "no-such-command", runtime=crun)
    with pytest.raises(FailedPrecondition, match="no-such-command"):
        await begin(node, "two")


@pytest.mark.parametrize("verb", ["create", "start", "delete", "exec", "pause"])
@pytest.mark.parametrize("how", ["exit 3", "kill -9 $$", 'echo "my own words" >&2; exit 1'])
async def test_a_runtime_that_fails_is_told_and_undone(verb: str, how: str, node: RuntimeNode) -> None:
    """One that is killed says nothing about what was asked: its clients are told that, and may ask again."""
    error = Aborted if "kill" in how else FailedPrecondition
    flag = node.directory / "fails"
    runtime = script(
        node.directory / "fragile",
        f'for word; do case $word in {verb}) [ -e {flag} ] && {{ {how}; }};; esac; done\nexec runc "$@"',
    )
    flag.touch()
    await create(node, "one", "sleep", "60", runtime=runtime)
    if verb in ("create", "start"):
        with pytest.raises(error, match=verb) as refused:
            await begin(node, "one")
        flag.unlink()
        if "own words" in how:
            assert "my own words" in refused.value.message or verb == "create"
        if verb == "create":
            assert not node.of_containers()
        else:
            await node.delete("one")
        await begin(node, "one")
        return
    flag.unlink()
    await begin(node, "one")
    flag.touch()
    if verb == "exec":
        request = api.ExecTask(container_id="one", exec_id="e", args=["true"], start=True)
        with pytest.raises(error, match="exec"):
            await node.client.call(api.TASK_EXEC, request)
        with pytest.raises(NotFound):
            await node.client.call(api.TASK_GET, api.ProcessRequest(container_id="one", exec_id="e"))
    elif verb == "pause":
        with pytest.raises(error, match="pause"):
            await node.client.call(api.TASK_PAUSE, api.TaskRequest(container_id="one"))
        assert await status(node, "one") == "running"
    else:
        await node.kill("one")
        await node.wait("one")
        with pytest.raises(error, match="delete"):
            await node.delete("one")
        assert await status(node, "one") == "stopped"
    flag.unlink()


async def test_containerd_s_runc_options_are_honoured(node: RuntimeNode) -> None:
    root = node.directory / "runc-root"
    calls = node.directory / "calls"
    binary = script(node.directory / "other-runc", f'echo "$@" >>{calls}\npwd >>{calls}.in\nexec runc "$@"')
    options = {
        "binary_name": binary, "root": str(root), "no_pivot_root": True, "no_new_keyring": True,
        "shim_cgroup": f"/{node.namespace}-shims",
    }  # fmt: skip
    await create(node, "one", "sleep", "60", options=options)
    await begin(node, "one")
    assert (root / node.namespace / "one" / "state.json").exists()
    made = calls.read_text().splitlines()[0].split()
    assert {"--no-pivot", "--no-new-keyring"} <= set(made)
    assert made[made.index("--root") + 1] == f"{root}/{node.namespace}"
    # As with containerd, the runtime starts in the bundle: a wrapper finds its container's config.json there.
    bundle = node.node.state / "runtime" / "bundles" / node.namespace / "one"
    assert set((node.directory / "calls.in").read_text().split()) == {str(bundle)}
    assert (bundle / "shim-binary-path").read_text() == binary
    (shim,) = shims(node)
    assert f"/{node.namespace}-shims" in Path(f"/proc/{shim}/cgroup").read_text()
    await node.kill("one")
    await node.wait("one")
    await node.delete("one")
    async with asyncio.timeout(10):
        while any(f"{node.namespace}-shims" in names for _, names, _ in os.walk("/sys/fs/cgroup")):
            await asyncio.sleep(0.05)
    await create(node, "two", "true", options={"binary_name": "no-such-runtime"})
    with pytest.raises(FailedPrecondition, match='"no-such-runtime" not found'):
        await begin(node, "two")


async def test_a_hundred_megabytes_are_read_to_the_last_byte(node: RuntimeNode) -> None:
    fifo = node.directory / "fifo"
    os.mkfifo(fifo)
    await node.container("one", "sh", "-c", "busybox dd if=/dev/zero bs=1M count=100 2>/dev/null; printf end")
    with subprocess.Popen(["tail", "-c", "10", str(fifo)], stdout=subprocess.PIPE) as reader:
        await begin(node, "one", stdio=Stdio(stdout=str(fifo)).model_dump())
        assert (await node.wait("one")).exit_status == 0
        await node.delete("one")
        text, _ = await asyncio.to_thread(reader.communicate, None, 60)
    assert text == b"\0" * 7 + b"end"


async def test_nobody_reading_hangs_neither_exit_nor_removal(node: RuntimeNode) -> None:
    for name in ("out", "err"):
        os.mkfifo(node.directory / name)
    stdio = Stdio(stdout=str(node.directory / "out"), stderr=str(node.directory / "err"))
    await node.container("one", "sh", "-c", "echo unread; exit 9")
    async with asyncio.timeout(20):
        await begin(node, "one", stdio=stdio.model_dump())
        assert (await node.wait("one")).exit_status == 9
        await node.delete("one")
    assert stat.S_ISFIFO((node.directory / "out").stat().st_mode)
