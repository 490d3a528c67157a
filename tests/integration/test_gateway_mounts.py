"""The mount manager as containerd's clients see it, and tasks whose root file systems need it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from shoal_bus.api import content
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.errors import NotFound, Unimplemented
from shoal_bus.types import Mount
from shoal_gateway.convert import mounts_told
from shoal_gateway.proto.containerd.services.containers.v1.containers_pb2 import DeleteContainerRequest
from shoal_gateway.proto.containerd.services.leases.v1 import leases_pb2 as leases
from shoal_gateway.proto.containerd.services.mounts.v1 import mounts_pb2 as pb
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as tasks
from shoal_gateway.proto.containerd.types.mount_pb2 import ActivationInfo

from tests.support.gateway import refusal, rpc
from tests.support.gateway_tasks import CONTAINERS, TASKS, Calls, GatewayNode, gateway_node
from tests.support.leaks import mounts as mount_points
from tests.support.mount_lists import image, is_read_only, layered, left, loops, no_loops, places

MOUNTS = "/containerd.services.mounts.v1.Mounts"
LEASES = "/containerd.services.leases.v1.Leases"
BREF = "containerd.io/gc.bref.container"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("n"), "content") as made:
        yield made


@pytest.fixture
async def calls(node: GatewayNode) -> AsyncIterator[Calls]:
    async with node.calls() as opened:
        yield opened
        for one in await listed(opened):
            await deactivate(opened, one.name)
    assert left(node.node) == []


@pytest.fixture
async def bus(node: GatewayNode) -> AsyncIterator[Client]:
    async with Client.open(node.node.natsd.address, node.node.name, node.namespace) as client:
        yield client


async def activate(calls: Calls, name: str, mounts: list[Mount], lease: str = "", **more: Any) -> ActivationInfo:
    request = pb.ActivateRequest(name=name, mounts=mounts_told(mounts), **more)
    metadata = (*calls.metadata, *([("containerd-lease", lease)] if lease else []))
    reply = await rpc(calls.channel, f"{MOUNTS}/Activate", request, reply=pb.ActivateResponse, metadata=metadata)
    return reply.info  # type: ignore[no-any-return]


async def info(calls: Calls, name: str) -> ActivationInfo:
    return (await calls.ask(f"{MOUNTS}/Info", pb.InfoRequest(name=name), pb.InfoResponse)).info  # type: ignore[no-any-return]


async def deactivate(calls: Calls, name: str) -> None:
    await calls.ask(f"{MOUNTS}/Deactivate", pb.DeactivateRequest(name=name))


async def listed(calls: Calls, *filters: str) -> list[ActivationInfo]:
    stream = calls.channel.unary_stream(f"{MOUNTS}/List")(
        pb.ListRequest(filters=filters).SerializeToString(), metadata=calls.metadata
    )
    return [pb.ListMessage.FromString(data).info async for data in stream]


async def refused(calls: Calls, mounts: list[Mount], **more: Any) -> tuple[str, str]:
    """How an activation is refused; nothing is left of it."""
    request = pb.ActivateRequest(name="refused", mounts=mounts_told(mounts), **more)
    outcome = await refusal(calls.channel, f"{MOUNTS}/Activate", request, metadata=calls.metadata)
    assert left(calls.node.node) == []
    assert await listed(calls) == []
    return outcome


async def is_gone(calls: Calls, name: str) -> None:
    assert await calls.refused(f"{MOUNTS}/Info", pb.InfoRequest(name=name)) == (
        "NOT_FOUND",
        f'mount "{name}": not found',
    )


def bind(source: Path, *options: str) -> Mount:
    return Mount(type="bind", source=str(source), options=["rbind", *options])


# --------------------------------------------------------------------------------------------------- root file systems


async def test_a_root_file_system_is_mounted_at_runtime(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    """As containerd's own test has it: an overlay in an image of XFS; a second task has what the first one wrote."""
    assert await listed(calls) == []
    device = image(tmp_path / "test-dev.img", "root1", "root2", "work", kind="xfs")
    said = tmp_path / "said"

    async def life(id: str, rootfs: list[Mount], *args: str) -> None:
        await calls.make(id, *args)
        await create(calls, id, rootfs, stdout=f"file://{said}")
        found = await info(calls, id)
        assert [(one.mount.type, bool(one.mounted_at.seconds)) for one in found.active] == [
            ("bind", True),
            ("xfs", True),
        ]
        assert {one.mount_point for one in found.active} < mount_points()
        assert [one.type for one in found.system] == ["overlay"]
        assert dict(found.labels) == {BREF: id}
        await calls.start(id)
        assert (await calls.wait(id)).exit_status == 0
        await calls.delete(id)
        await is_gone(calls, id)
        await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id=id))
        assert left(node.node) == []
        assert no_loops(tmp_path)

    write = ["sh", "-c", "echo -n 'Test mount at runtime'> /etc/test-name.txt"]
    await life("first", layered(device, node.rootfs, "root1", kind="xfs"), *write)
    await life("second", layered(device, node.rootfs, "root2", "root1", kind="xfs"), "cat", "/etc/test-name.txt")
    assert said.read_text() == "Test mount at runtime"
    assert not (node.rootfs / "etc/test-name.txt").exists()


async def create(calls: Calls, id: str, rootfs: list[Mount], **more: Any) -> int:
    request = tasks.CreateTaskRequest(container_id=id, rootfs=mounts_told(rootfs), **more)
    return int((await calls.ask(f"{TASKS}/Create", request, tasks.CreateTaskResponse)).pid)


async def test_a_plain_list_needs_no_activation_also_with_the_option_loop(
    node: GatewayNode, calls: Calls, tmp_path: Path
) -> None:
    device = image(tmp_path / "plain.img")
    await calls.make("plain", "sh", "-c", "exit 3")
    await create(calls, "plain", [Mount(type="ext4", source=str(device), options=["loop"]), bind(node.rootfs)])
    await is_gone(calls, "plain")
    assert len(loops(tmp_path)) == 1
    await calls.start("plain")
    assert (await calls.wait("plain")).exit_status == 3
    await calls.end_created("plain")
    assert no_loops(tmp_path)


async def test_a_task_that_cannot_be_created_leaves_nothing(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    device = image(tmp_path / "failed.img", "up", "work")
    await calls.make("failed", "/no/such/program")
    request = tasks.CreateTaskRequest(container_id="failed", rootfs=mounts_told(layered(device, node.rootfs, "up")))
    code, message = await calls.refused(f"{TASKS}/Create", request)
    assert "no such" in message.lower(), code
    wrong = layered(device, node.rootfs, "missing")
    request = tasks.CreateTaskRequest(container_id="failed", rootfs=mounts_told(wrong))
    assert (await calls.refused(f"{TASKS}/Create", request))[0] == "FAILED_PRECONDITION"
    request = tasks.CreateTaskRequest(container_id="failed", rootfs=mounts_told([Mount(type="loop", source="/none")]))
    assert (await calls.refused(f"{TASKS}/Create", request))[0] == "FAILED_PRECONDITION"
    assert left(node.node) == []
    assert no_loops(tmp_path)
    await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id="failed"))


async def test_an_activation_of_that_name_is_used(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    """It stays where the task can't be created, and goes with the task."""
    device = image(tmp_path / "used.img", "up", "work")
    rootfs = layered(device, node.rootfs, "up")
    before = await activate(calls, "used", rootfs)
    await calls.make("used", "/no/such/program")
    await calls.refused(f"{TASKS}/Create", tasks.CreateTaskRequest(container_id="used", rootfs=mounts_told(rootfs)))
    assert await info(calls, "used") == before
    await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id="used"))
    await calls.make("used", "sleep", "60")
    # What is asked for now isn't what is mounted: that is what is active.
    await create(calls, "used", [Mount(type="loop", source="/none")])
    assert await info(calls, "used") == before
    await calls.end_created("used")
    await is_gone(calls, "used")
    assert no_loops(tmp_path)


async def test_a_forced_removal_and_a_dead_shim_leave_nothing(
    node: GatewayNode, calls: Calls, bus: Client, tmp_path: Path
) -> None:
    device = image(tmp_path / "taken.img", "up", "work")
    for id in ("forced", "shimless"):
        await calls.make(id)
        pid = await create(calls, id, layered(device, node.rootfs, "up"))
        await calls.start(id)
        if id == "shimless":
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(parent, signal.SIGKILL)
            assert (await calls.wait(id)).exit_status == 137
            assert len((await info(calls, id)).active) == 2
            await calls.delete(id)
            await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id=id))
        else:
            await bus.call(api.CONTAINER_REMOVE, api.RemoveContainer(id=id, force=True))
        await is_gone(calls, id)
        assert left(node.node) == []
        assert no_loops(tmp_path)


# --------------------------------------------------------------------------------------------------------- activations


async def test_what_can_be_mounted_as_it_is_is_unimplemented(node: GatewayNode, calls: Calls) -> None:
    for mounts in ([], [bind(node.rootfs)], [Mount(type="unknown/overlay", source="x")]):
        code, message = await refused(calls, mounts)
        assert (code, "nothing to activate" in message) == ("UNIMPLEMENTED", True)
    assert (await refused(calls, [], temporary=True))[0] == "UNIMPLEMENTED"


async def test_transforms_make_what_a_mount_needs(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    """The example of containerd's documentation: a file system made in a file, and directories made in that."""
    file = node.node.root / "writable.img"
    mounts = [
        Mount(type="mkfs/loop", source=str(file), options=["X-containerd.mkfs.size=8MiB", "X-containerd.mkfs.fs=ext4"]),
        Mount(type="format/ext4", source="{{ mount 0 }}"),
        Mount(
            type="mkdir/format/overlay",
            source="overlay",
            options=[
                "X-containerd.mkdir.path={{ mount 1 }}/upper:0755:1000:1000",
                "X-containerd.mkdir.path={{ mount 1 }}/work",
                f"lowerdir={node.rootfs}", "upperdir={{ mount 1 }}/upper", "workdir={{ mount 1 }}/work",
            ],
        ),
    ]  # fmt: skip
    try:
        made = await activate(calls, "made", mounts, labels={"a": "b", "empty": ""})
        loop, ext4 = made.active
        place = str(places(node.node))
        assert (loop.mount.type, loop.mount.source, list(loop.mount.options)) == ("loop", str(file), [])
        assert dict(loop.data) == {"device": str(Path(loop.mount_point).readlink())}
        assert loops(node.node.directory) == [loop.data["device"]]
        assert (ext4.mount.type, ext4.mount.source) == ("ext4", loop.mount_point)
        assert ext4.mount_point.startswith(place)
        (overlay,) = made.system
        assert overlay.type == "overlay"
        assert list(overlay.options) == [
            f"lowerdir={node.rootfs}", f"upperdir={ext4.mount_point}/upper", f"workdir={ext4.mount_point}/work",
        ]  # fmt: skip
        upper = Path(ext4.mount_point, "upper")
        (upper / "kept").write_text("kept")
        assert (upper.stat().st_uid, upper.stat().st_mode & 0o777) == (1000, 0o755)
        assert dict(made.labels) == {"a": "b"}
        assert await info(calls, "made") == made
        again = pb.ActivateRequest(name="made", mounts=mounts_told(mounts))
        assert await calls.refused(f"{MOUNTS}/Activate", again) == ("ALREADY_EXISTS", 'mount "made": already exists')
        await deactivate(calls, "made")
        await is_gone(calls, "made")
        assert left(node.node) == []
        made = await activate(calls, "made", mounts)
        assert Path(made.active[1].mount_point, "upper/kept").read_text() == "kept"
        await deactivate(calls, "made")
    finally:
        file.unlink(missing_ok=True)


async def test_a_read_only_file_system_needs_its_directories(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    """As the view of a snapshot has it whose directories were made when it was written to."""
    device = image(tmp_path / "view.img", "upper")

    def view(*directories: str) -> list[Mount]:
        asked = [f"X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}" for name in directories]
        return [
            Mount(type="ext4", source=str(device), options=["ro", "loop"]),
            Mount(type="format/mkdir/bind", source="{{ mount 0 }}/upper", options=[*asked, "rbind", "ro"]),
        ]

    made = await activate(calls, "view", view("upper:0755:0:0"))
    assert list(made.system[0].options) == ["rbind", "ro"]
    assert is_read_only(*loops(tmp_path))
    await deactivate(calls, "view")
    for wrong in ("upper:0700", "new"):
        code, message = await refused(calls, view(wrong))
        assert (code, "Read-only file system" in message) == ("FAILED_PRECONDITION", True)


async def test_a_temporary_activation_is_a_bind_mount(node: GatewayNode, calls: Calls, tmp_path: Path) -> None:
    device = image(tmp_path / "temporary.img", "up", "work")
    made = await activate(calls, "temporary", layered(device, node.rootfs, "up"), temporary=True)
    assert [one.mount.type for one in made.active] == ["bind", "ext4", "overlay"]
    (bound,) = made.system
    assert (bound.type, bound.source, list(bound.options)) == ("bind", made.active[2].mount_point, ["rbind"])
    assert (Path(bound.source) / "bin/busybox").exists()
    plain = await activate(calls, "plain", [bind(node.rootfs, "ro")], temporary=True)
    with pytest.raises(OSError, match="Read-only"):
        Path(plain.system[0].source, "new").touch()
    await deactivate(calls, "temporary")
    await deactivate(calls, "plain")


@pytest.mark.parametrize("options", [["sync"], ["ro"], ["direct-io"]])
async def test_a_loop_device_is_as_it_is_asked_for(
    node: GatewayNode, calls: Calls, tmp_path: Path, options: list[str]
) -> None:
    device = image(tmp_path / "loop.img", "inside")
    made = await activate(calls, "loop", [Mount(type="loop", source=str(device), options=options)])
    (loop,) = loops(tmp_path)
    assert is_read_only(loop) == ("ro" in options)
    assert Path("/sys/block", Path(loop).name, "loop/autoclear").read_text() == "0\n"
    if "direct-io" in options:
        assert Path("/sys/block", Path(loop).name, "loop/dio").read_text() == "1\n"
    await asyncio.to_thread(Path(loop).read_bytes)
    assert made.system == []
    await deactivate(calls, "loop")
    assert no_loops(tmp_path)


async def test_a_device_that_is_used_goes_when_it_is_not_any_more(
    node: GatewayNode, calls: Calls, tmp_path: Path
) -> None:
    device = image(tmp_path / "busy.img", "inside")
    made = await activate(
        calls,
        "busy",
        [Mount(type="ext4", source=str(device), options=["loop"]), Mount(type="format/bind", source="{{ mount 0 }}")],
    )
    with Path(made.active[0].mount_point, "inside/file").open("w") as opened:
        await deactivate(calls, "busy")
        assert len(loops(tmp_path)) == 1
        assert list(places(node.node).glob("*")) == []
        opened.write("x")
    async with asyncio.timeout(5):
        while loops(tmp_path):
            await asyncio.sleep(0.01)


async def test_types_are_left_to_a_caller_that_can_do_them(
    node: GatewayNode, calls: Calls, bus: Client, tmp_path: Path
) -> None:
    device = image(tmp_path / "allowed.img", "inside")
    mounts = [Mount(type="loop", source=str(device)), Mount(type="format/ext4", source="{{ mount 0 }}")]
    request = api.ActivateMounts(name="allowed", mounts=mounts[:1], allow_mount_types=["loop"])
    with pytest.raises(Unimplemented):
        await bus.call(api.MOUNT_ACTIVATE, request)
    request = api.ActivateMounts(name="allowed", mounts=mounts, allow_mount_types=["format/*"])
    made = await bus.call(api.MOUNT_ACTIVATE, request)
    assert [one.mount.type for one in made.active] == ["loop"]
    assert made.system == mounts[1:]
    request = api.ActivateMounts(name="needed", mounts=mounts, allow_mount_types=["loop"])
    made = await bus.call(api.MOUNT_ACTIVATE, request)
    assert [one.mount.type for one in made.active] == ["loop"], "the template needs it"


async def test_activations_are_listed_and_labelled(node: GatewayNode, calls: Calls, bus: Client) -> None:
    mounts = [bind(node.rootfs), Mount(type="format/bind", source="{{ mount 0 }}")]
    for n in range(40):
        await activate(calls, f"m{n:02}", mounts, labels={"n": str(n), "of": "test"})
    assert [one.name for one in await listed(calls)] == [f"m{n:02}" for n in range(40)]
    assert [one.name for one in await listed(calls, "name==m07", "labels.n==9")] == ["m07", "m09"]
    assert len(await listed(calls, "labels.of")) == 40
    other = await bus.with_namespace("elsewhere").collect(api.MOUNT_LIST, api.ListMounts())
    assert other == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(calls, "name==")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        request = pb.UpdateRequest(info=ActivationInfo(name="m00", labels=labels))
        request.update_mask.paths.extend(paths)
        reply = await calls.ask(f"{MOUNTS}/Update", request, pb.UpdateResponse)
        assert reply.info == await info(calls, "m00")
        return dict(reply.info.labels)

    assert await update({"x": "y"}, "labels.x") == {"n": "0", "of": "test", "x": "y"}
    assert await update({"ignored": "z"}, "labels.x", "labels.n") == {"of": "test"}
    assert await update({"all": "new", "empty": ""}, "labels") == {"all": "new"}
    assert await update({"b": "c"}) == {"b": "c"}
    request = pb.UpdateRequest(info=ActivationInfo(name="m00"))
    request.update_mask.paths.append("system")
    assert (await calls.refused(f"{MOUNTS}/Update", request))[0] == "INVALID_ARGUMENT"
    request = pb.UpdateRequest(info=ActivationInfo(name="none"))
    assert (await calls.refused(f"{MOUNTS}/Update", request))[0] == "NOT_FOUND"


async def test_one_name_is_activated_once_however_many_ask(node: GatewayNode, calls: Calls) -> None:
    mounts = [bind(node.rootfs), Mount(type="format/bind", source="{{ mount 0 }}")]
    outcomes = await asyncio.gather(*(activate(calls, "one", mounts) for _ in range(8)), return_exceptions=True)
    codes = [one.code().name for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    assert codes == ["ALREADY_EXISTS"] * 7
    assert len([point for point in mount_points() if point.startswith(str(places(node.node)))]) == 1


INSIDE = Mount(type="format/bind", source="{{ mount 0 }}")


@pytest.mark.parametrize(
    ("mounts", "code", "words"),
    [
        ([Mount(type="loop", source="/no/such/file")], "FAILED_PRECONDITION", "No such file"),
        ([Mount(type="loop", source="/etc")], "FAILED_PRECONDITION", "Is a directory"),
        ([Mount(type="loop", source="/etc/hostname", options=["size=1"])], "INVALID_ARGUMENT", "option size=1"),
        ([Mount(type="nosuchfs", source="x"), INSIDE], "FAILED_PRECONDITION", "No such device"),
        ([Mount(type="bind", source="/none", options=["bind"]), INSIDE], "FAILED_PRECONDITION", "No such file"),
        ([Mount(type="tmpfs", source="x", target="/inside"), INSIDE], "INVALID_ARGUMENT", "can't have a target"),
        ([Mount(type="tmpfs", source="x", options=["X-containerd.mkdir.path=/x"]), INSIDE], "FAILED_PRECONDITION",
         "X-containerd.mkdir.path=/x"),
        ([Mount(type="tmpfs", source="x"), Mount(type="format/bind", source="{{ mount 1 }}")], "INVALID_ARGUMENT",
         "1 active mounts"),
        ([Mount(type="tmpfs", source="x"), Mount(type="format/bind", source="{{ rm 1 }}")], "INVALID_ARGUMENT",
         "is none"),
        ([Mount(type="tmpfs", source="x"), Mount(type="mkdir/bind", source="x",
          options=["X-containerd.mkdir.path=/etc/shoal"])], "INVALID_ARGUMENT", "isn't below the node's"),
        ([Mount(type="mkfs/loop", source="/etc/shoal", options=["X-containerd.mkfs.size=8MiB"])], "INVALID_ARGUMENT",
         "isn't below the node's"),
        ([Mount(type="mkfs/loop", source="/etc/shoal")], "INVALID_ARGUMENT", "size"),
        ([Mount(type="format/", source="/etc/shoal")], "INVALID_ARGUMENT", "no type"),
        ([Mount(type="loop", source="x")] * 256, "INVALID_ARGUMENT", "255"),
    ],
)  # fmt: skip
async def test_what_cannot_be_activated_is_told_and_undone(
    calls: Calls, mounts: list[Mount], code: str, words: str
) -> None:
    outcome = await refused(calls, mounts)
    assert (outcome[0], words in outcome[1]) == (code, True), outcome


async def test_what_is_not_there_or_has_no_name_is_told(calls: Calls) -> None:
    await is_gone(calls, "none")
    outcome = await calls.refused(f"{MOUNTS}/Deactivate", pb.DeactivateRequest(name="none"))
    assert outcome == ("NOT_FOUND", 'mount "none": not found')
    assert (await calls.refused(f"{MOUNTS}/Deactivate", pb.DeactivateRequest(name="x" * 2000)))[0] == "NOT_FOUND"
    assert (await calls.refused(f"{MOUNTS}/Info", pb.InfoRequest()))[0] == "NOT_FOUND"
    assert (await calls.refused(f"{MOUNTS}/Activate", pb.ActivateRequest()))[0] == "INVALID_ARGUMENT"
    code, message = await refusal(calls.channel, f"{MOUNTS}/List", pb.ListRequest())
    assert (code, "namespace is required" in message) == ("FAILED_PRECONDITION", True)


# ---------------------------------------------------------------------------------------------------------- collection


async def gc(bus: Client) -> dict[str, int]:
    return (await bus.call(content.NODE_GC, content.Collect())).counts


async def test_an_activation_goes_with_its_lease(node: GatewayNode, calls: Calls, bus: Client) -> None:
    mounts = [bind(node.rootfs), INSIDE]
    await calls.ask(f"{LEASES}/Create", leases.CreateRequest(id="holds", labels={"containerd.io/gc.flat": "1"}))
    await activate(calls, "leased", mounts, lease="holds")
    await activate(calls, "loose", mounts)
    assert await gc(bus) == {"mounts": 1}
    assert [one.name for one in await listed(calls)] == ["leased"]
    await calls.ask(f"{LEASES}/Delete", leases.DeleteRequest(id="holds", sync=True))
    assert await listed(calls) == []
    assert left(node.node) == []
    request = pb.ActivateRequest(name="late", mounts=mounts_told(mounts))
    metadata = (*calls.metadata, ("containerd-lease", "holds"))
    outcome = await refusal(calls.channel, f"{MOUNTS}/Activate", request, metadata=metadata)
    assert outcome == ("NOT_FOUND", "lease does not exist: not found")


async def test_a_container_holds_what_refers_back_to_it(node: GatewayNode, calls: Calls, bus: Client) -> None:
    mounts = [bind(node.rootfs), INSIDE]
    await calls.make("owner")
    await activate(calls, "held", mounts, labels={f"{BREF}.a": "owner"})
    await activate(calls, "other", mounts, labels={BREF: "nobody"})
    assert await gc(bus) == {"mounts": 1}
    assert [one.name for one in await listed(calls)] == ["held"]
    await calls.ask(f"{CONTAINERS}/Delete", DeleteContainerRequest(id="owner"))
    assert await gc(bus) == {"mounts": 1}
    await is_gone(calls, "held")


async def test_what_a_task_uses_is_not_collected(node: GatewayNode, calls: Calls, bus: Client, tmp_path: Path) -> None:
    device = image(tmp_path / "task.img", "up", "work")
    await calls.make("uses")
    await create(calls, "uses", layered(device, node.rootfs, "up"))
    await bus.call(api.MOUNT_UPDATE, api.UpdateMount(name="uses"))
    assert (await info(calls, "uses")).labels == {}
    assert await gc(bus) == {}
    assert len((await info(calls, "uses")).active) == 2
    await calls.end_created("uses")
    with pytest.raises(NotFound):
        await bus.call(api.MOUNT_INFO, api.MountRequest(name="uses"))
