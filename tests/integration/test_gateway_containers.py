"""Containers through the gateway: what clients store comes back as it was, and changes by field masks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_gateway.proto.containerd.events import container_pb2 as events
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as pb

from tests.support.gateway import until
from tests.support.gateway_tasks import CONTAINERS, RUNC_V2, SPEC, Calls, GatewayNode, gateway_node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("n")) as made:
        yield made


@pytest.fixture
async def calls(node: GatewayNode) -> AsyncIterator[Calls]:
    async with node.calls() as opened:
        yield opened


SPEC_BYTES = b'{ "ociVersion":"1.0.2",\t"hostname" : "\xc3\xa4", "x": 18446744073709551615, "y": 1.50 }\n'
"""JSON that no encoder would write so."""
OPTIONS = Options(binary_name="crun", root="/run/elsewhere", systemd_cgroup=False, no_new_keyring=True)


async def refused(calls: Calls, method: str, request: Any) -> tuple[str, str]:
    return await calls.refused(f"{CONTAINERS}/{method}", request)


def asked(id: str, **more: Any) -> pb.Container:
    fields = {"runtime": pb.Container.Runtime(name=RUNC_V2), "spec": AnyMessage(type_url=SPEC, value=b"{}"), **more}
    return pb.Container(id=id, **fields)


# ---------------------------------------------------------------------------------------------------------- the record


async def test_all_of_a_container_comes_back_byte_for_byte(calls: Calls) -> None:
    wanted = asked(
        "whole",
        labels={"team": "blue", "a.b/c": "x=y", "empty": ""},
        image="docker.io/library/busybox:latest",
        runtime=pb.Container.Runtime(
            name="io.containerd.runc.v2",
            options=AnyMessage(
                type_url="containerd.runc.v1.Options", value=OPTIONS.SerializeToString() + b"\xb8\x3e\x01"
            ),
        ),
        spec=AnyMessage(type_url="types.containerd.io/opencontainers/runtime-spec/1/Spec", value=SPEC_BYTES),
        snapshotter="overlayfs",
        snapshot_key="whole-1",
        extensions={
            "nerdctl": AnyMessage(type_url="example.com/what.ever", value=bytes(range(256))),
            "a.b": AnyMessage(type_url="", value=b""),
        },
        sandbox="pod-1",
    )
    made = await calls.make_of(wanted)
    assert made.created_at.ToNanoseconds() == made.updated_at.ToNanoseconds() > 0
    expected = pb.Container()
    expected.CopyFrom(wanted)
    del expected.labels["empty"]
    expected.created_at.CopyFrom(made.created_at)
    expected.updated_at.CopyFrom(made.updated_at)
    assert made == expected
    assert await calls.container_of("whole") == expected
    reply = await calls.ask(
        f"{CONTAINERS}/List", pb.ListContainersRequest(filters=["id==whole"]), pb.ListContainersResponse
    )
    assert list(reply.containers) == [expected]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("io.containerd.runsc.v1", AnyMessage(type_url="runtimeoptions.v1.Options", value=b"\x12\x04/etc")),
        ("io.containerd.runtime.v1.linux", AnyMessage(type_url="unknown.Type", value=b"\xff\xff")),
        ("/usr/local/bin/containerd-shim-runc-v2", AnyMessage()),
        ("whatever", None),
    ],
)
async def test_a_runtime_and_its_options_are_kept_whatever_they_are(
    calls: Calls, name: str, options: AnyMessage | None
) -> None:
    id = f"rt-{name.replace('/', '').replace('.', '')[:40]}"
    await calls.make_of(asked(id, runtime=pb.Container.Runtime(name=name, options=options)))
    found = (await calls.container_of(id)).runtime
    assert (found.name, found.options) == (name, options or AnyMessage())


async def test_what_a_client_stored_is_a_specification_for_the_bus(node: GatewayNode, calls: Calls) -> None:
    await calls.make("both", "true", sandbox="pod")
    async with Client.open(node.node.natsd.address, node.node.name, node.namespace) as client:
        found = await client.call(runtime.CONTAINER_GET, runtime.GetContainer(id="both"))
        assert (found.spec["process"]["args"], found.packed_spec, found.sandbox) == (["true"], None, "pod")
        assert found.runtime == RUNC_V2
        update = runtime.UpdateContainer(id="both", labels={"by": "bus"}, fields=["labels.by"])
        await client.call(runtime.CONTAINER_UPDATE, update)
    assert dict((await calls.container_of("both")).labels) == {"by": "bus"}


async def test_a_container_of_shoals_own_is_runcs(node: GatewayNode, calls: Calls) -> None:
    async with Client.open(node.node.natsd.address, node.node.name, node.namespace) as client:
        for id, program in (("own-runc", "runc"), ("own-crun", "crun")):
            request = runtime.CreateContainer(id=id, runtime=program, spec=node.spec("true"))
            await client.call(runtime.CONTAINER_CREATE, request)
    for id, binary in (("own-runc", ""), ("own-crun", "crun")):
        found = await calls.container_of(id)
        assert found.runtime.name == RUNC_V2
        assert Options.FromString(found.runtime.options.value).binary_name == binary
        assert found.spec.type_url == SPEC
        # A client that changes a label by replacing all says what it has read.
        found.labels["seen"] = "yes"
        assert dict((await calls.update(found)).labels) == {"seen": "yes"}


async def test_creating_twice_already_exists_and_changes_nothing(calls: Calls) -> None:
    first = await calls.make("twice", image="one")
    code, message = await refused(calls, "Create", pb.CreateContainerRequest(container=asked("twice", image="two")))
    assert code == "ALREADY_EXISTS"
    assert "twice" in message
    assert await calls.container_of("twice") == first


async def test_a_deleted_container_is_gone(calls: Calls) -> None:
    await calls.make("gone")
    await calls.ask(f"{CONTAINERS}/Delete", pb.DeleteContainerRequest(id="gone"))
    assert (await refused(calls, "Get", pb.GetContainerRequest(id="gone")))[0] == "NOT_FOUND"
    assert (await refused(calls, "Delete", pb.DeleteContainerRequest(id="gone")))[0] == "NOT_FOUND"
    assert (await refused(calls, "Update", pb.UpdateContainerRequest(container=asked("gone"))))[0] == "NOT_FOUND"


async def test_namespaces_hold_containers_of_one_id(node: GatewayNode, calls: Calls) -> None:
    await calls.make("shared")
    other = grpc.aio.Metadata(("containerd-namespace", f"{node.namespace}-other"))
    with pytest.raises(grpc.aio.AioRpcError) as absent:
        await calls.channel.unary_unary(f"{CONTAINERS}/Get")(
            pb.GetContainerRequest(id="shared").SerializeToString(), metadata=other, timeout=10
        )
    assert absent.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as nameless:
        await calls.channel.unary_unary(f"{CONTAINERS}/Get")(
            pb.GetContainerRequest(id="shared").SerializeToString(), timeout=10
        )
    assert nameless.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "namespace is required" in (nameless.value.details() or "")


# ------------------------------------------------------------------------------------------------------------- changes


async def fresh(calls: Calls, id: str) -> pb.Container:
    """A container with something in each field that may be changed."""
    extensions = {"one": AnyMessage(type_url="t", value=b"1"), "a.b": AnyMessage(type_url="t", value=b"2")}
    made = asked(id, labels={"a": "1", "b.c": "2"}, image="before", snapshotter="native", snapshot_key="k")
    for name, extension in extensions.items():
        made.extensions[name].CopyFrom(extension)
    return await calls.make_of(made)


CHANGED: list[tuple[list[str], dict[str, Any]]] = [
    (["labels"], {"labels": {"a": "9"}}),
    (["labels.a"], {"labels": {"a": "9", "b.c": "2"}}),
    (["labels.b.c"], {"labels": {"a": "1"}}),
    (["image"], {"image": "after"}),
    (["snapshotkey"], {"snapshot_key": "k2"}),
    (["spec"], {"spec": b'{"new": true}'}),
    (["extensions"], {"extensions": {"one": b"9"}}),
    (["extensions.one"], {"extensions": {"one": b"9", "a.b": b"2"}}),
    (["extensions.a.b"], {"extensions": {"one": b"1"}}),
    (["image", "labels.a"], {"image": "after", "labels": {"a": "9", "b.c": "2"}}),
    (
        [],
        {"labels": {"a": "9"}, "image": "after", "snapshot_key": "k2", "spec": b'{"new": true}',
         "extensions": {"one": b"9"}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("paths", "changes"), CHANGED, ids=[",".join(paths) or "all" for paths, _ in CHANGED])
async def test_a_mask_changes_what_it_names_and_nothing_else(
    calls: Calls, paths: list[str], changes: dict[str, Any]
) -> None:
    id = f"mask-{CHANGED.index((paths, changes))}"
    before = await fresh(calls, id)
    change = asked(id, labels={"a": "9", "b.c": ""}, image="after", snapshotter="native", snapshot_key="k2")
    change.spec.value = b'{"new": true}'
    change.extensions["one"].CopyFrom(AnyMessage(type_url="t", value=b"9"))
    after = await calls.update(change, *paths)

    def shown(container: pb.Container) -> dict[str, Any]:
        return {
            "labels": dict(container.labels), "image": container.image, "snapshot_key": container.snapshot_key,
            "spec": container.spec.value, "extensions": {name: one.value for name, one in container.extensions.items()},
        }  # fmt: skip

    assert shown(after) == {**shown(before), **changes}
    assert after.updated_at.ToNanoseconds() > after.created_at.ToNanoseconds() == before.created_at.ToNanoseconds()
    assert await calls.container_of(id) == after


async def test_replacing_all_keeps_the_runtime_and_the_snapshotter(calls: Calls) -> None:
    before = await fresh(calls, "immutable")
    for change in ({"snapshotter": "overlayfs"}, {"runtime": pb.Container.Runtime(name="io.containerd.crun.v1")}):
        other = pb.Container()
        other.CopyFrom(before)
        other.MergeFrom(pb.Container(**change))
        code, message = await refused(calls, "Update", pb.UpdateContainerRequest(container=other))
        assert code == "INVALID_ARGUMENT"
        assert next(iter(change)) in message
    assert await calls.container_of("immutable") == before


@pytest.mark.parametrize(
    "path",
    [
        "id",
        "runtime",
        "runtime.name",
        "snapshotter",
        "snapshot_key",
        "sandbox",
        "labels.",
        "extensions.",
        "x",
        "",
        "Spec",
    ],
)
async def test_other_paths_are_invalid_arguments(calls: Calls, path: str) -> None:
    request = pb.UpdateContainerRequest(container=asked("whole"))
    request.update_mask.paths.append(path)
    assert (await refused(calls, "Update", request))[0] == "INVALID_ARGUMENT"


# --------------------------------------------------------------------------------------------------------------- lists


async def test_lists_are_filtered_in_containerds_language(calls: Calls) -> None:
    for number in range(3):
        await calls.make(f"list-{number}", image=f"image-{number}", labels={"n": str(number), "x.y": "z"})
    assert await calls.ids("id==list-1") == ["list-1"]
    assert await calls.ids("image==image-2") == ["list-2"]
    assert await calls.ids('labels."x.y"==z,labels.n!=0') == ["list-1", "list-2"]
    assert await calls.ids("id~=^list-[01]$") == ["list-0", "list-1"]
    assert await calls.ids("id==list-0", "id==list-2") == ["list-0", "list-2"]
    assert {"list-0", "list-1", "list-2"} <= set(await calls.ids(f"runtime.name=={RUNC_V2}"))
    assert await calls.ids("id==nothing") == []


async def test_lists_larger_than_a_message_of_the_bus_pass(calls: Calls) -> None:
    """Forty specifications of 128 KiB: five times what one of its messages holds."""
    value = b'{"x": "' + b"y" * (128 << 10) + b'"}'
    for number in range(40):
        await calls.make_of(asked(f"large-{number:02}", spec=AnyMessage(type_url=SPEC, value=value)))
    request = pb.ListContainersRequest(filters=["id~=^large-"])
    reply = await calls.ask(f"{CONTAINERS}/List", request, pb.ListContainersResponse)
    streamed = calls.channel.unary_stream(
        f"{CONTAINERS}/ListStream",
        request_serializer=pb.ListContainersRequest.SerializeToString,
        response_deserializer=pb.ListContainerMessage.FromString,
    )(request, metadata=calls.metadata, timeout=30)
    one_by_one = [message.container async for message in streamed]
    assert list(reply.containers) == one_by_one
    assert [container.id for container in one_by_one] == [f"large-{number:02}" for number in range(40)]
    assert {container.spec.value for container in one_by_one} == {value}


# ------------------------------------------------------------------------------------------------------------- refusals


OPTIONS_TYPE = Options.DESCRIPTOR.full_name
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no id", {"id": ""}, "container.ID"),
    ("a path for an id", {"id": "../x"}, "container.ID"),
    ("a long id", {"id": "x" * 77}, "container.ID"),
    ("no runtime", {"runtime": None}, "Runtime.Name"),
    ("no specification", {"spec": None}, "Spec must be set"),
    ("a snapshot without its snapshotter", {"snapshot_key": "k"}, "Snapshotter"),
    ("a long label", {"labels": {"k": "v" * 4096}}, "label"),
    ("an extension without a name", {"extensions": {"": AnyMessage()}}, "Extension"),
    (
        "options that are no protobuf",
        {"runtime": {"name": RUNC_V2, "options": AnyMessage(type_url=f"x/{OPTIONS_TYPE}", value=b"\xff")}},
        "containerd.runc.v1.Options",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
async def test_a_container_that_cant_be_is_an_invalid_argument(
    calls: Calls, change: dict[str, Any], words: str
) -> None:
    fields = {"id": "bad", "runtime": pb.Container.Runtime(name=RUNC_V2), "spec": AnyMessage(type_url=SPEC), **change}
    code, message = await refused(calls, "Create", pb.CreateContainerRequest(container=pb.Container(**fields)))
    assert code == "INVALID_ARGUMENT"
    assert words in message
    assert await calls.ids("id==bad") == []


@pytest.mark.parametrize("method", ["Get", "List", "ListStream", "Create", "Update", "Delete"])
async def test_what_is_no_protobuf_is_refused_as_containerd_does(calls: Calls, method: str) -> None:
    code, message = await refused(calls, method, b"\x0a\xff\x01x")
    assert code == "INTERNAL"
    assert message.startswith("grpc: error unmarshalling request")


async def test_bad_filters_are_invalid_arguments(calls: Calls) -> None:
    request = pb.ListContainersRequest(filters=["id=="])
    assert (await refused(calls, "List", request))[0] == "INVALID_ARGUMENT"
    assert (await refused(calls, "ListStream", request))[0] == "INVALID_ARGUMENT"


# -------------------------------------------------------------------------------------------------------------- events


async def test_a_containers_life_is_told_in_order(calls: Calls) -> None:
    packed = AnyMessage(type_url="containerd.runc.v1.Options", value=OPTIONS.SerializeToString())
    async with calls.events() as told:
        await calls.make("told", image="i", runtime=pb.Container.Runtime(name=RUNC_V2, options=packed))
        await calls.update(asked("told", labels={"a": "b"}), "labels.a")
        await calls.ask(f"{CONTAINERS}/Delete", pb.DeleteContainerRequest(id="told"))
        await until(lambda: len(told) == 3)
    assert [one.topic for one in told] == ["/containers/create", "/containers/update", "/containers/delete"]
    assert [one.event.type_url for one in told] == [
        "containerd.events.ContainerCreate", "containerd.events.ContainerUpdate", "containerd.events.ContainerDelete",
    ]  # fmt: skip
    created = events.ContainerCreate.FromString(told[0].event.value)
    assert (created.id, created.image, created.runtime.name) == ("told", "i", RUNC_V2)
    assert created.runtime.options == packed
    updated = events.ContainerUpdate.FromString(told[1].event.value)
    assert (updated.id, updated.image, dict(updated.labels)) == ("told", "i", {"a": "b"})


def test_nothing_that_was_refused_left_a_traceback(node: GatewayNode) -> None:
    for service in ("gateway", "runtime"):
        assert "Traceback" not in node.node.of(service).log.read_text()
