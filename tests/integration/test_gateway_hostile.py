"""Every method of the gateway with everything wrong that a client can get wrong, beside what containerd answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from shoal_gateway.proto.containerd.events.image_pb2 import ImageCreate
from shoal_gateway.proto.containerd.events.snapshot_pb2 import SnapshotPrepare
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as containers
from shoal_gateway.proto.containerd.services.content.v1 import content_pb2 as content
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import PublishRequest
from shoal_gateway.proto.containerd.services.images.v1 import images_pb2 as images
from shoal_gateway.proto.containerd.services.snapshots.v1 import snapshots_pb2 as snapshots
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor
from shoal_gateway.server import SERVICERS

from tests.support import bundle, containerd
from tests.support.gateway import refusal, rpc, until
from tests.support.gateway_tasks import (
    CONTAINERS,
    EVENTS,
    RUNC_V2,
    SLEEPS,
    SPEC,
    GatewayNode,
    document,
    gateway_node,
)
from tests.support.hostile import PENDING, outcomes, tries
from tests.support.hostile_bases import ACTIVE, CONTAINER, DIGEST, IMAGE, SERVICES, bases, furnish, packed, target

Outcomes = dict[str, tuple[str, str]]

SINCE_1_7 = ("mounts", "sandbox", "streaming", "transfer")
"""Services that Debian's containerd, 1.6, hasn't got."""
ENDS_IT = {"Diff/Apply nothing", "Events/Forward nothing"}
"""What containerd 1.6 doesn't survive."""


@dataclass(frozen=True)
class Difference:
    """Answers that differ from containerd's on purpose."""

    ours: str
    theirs: str
    what: str
    """Which calls, as a regular expression for their names."""
    why: str
    sometimes: bool = False
    """It needn't be seen each time: gRPC begins to refuse long trailers by chance."""


DIFFERENCES = [
    Difference(".*", "UNKNOWN", ".*", "containerd has no code for what went wrong, and a client nothing to go by"),
    Difference(".*", "INTERNAL", r".*(_at|timestamp)\.(seconds|nanos) .*", "1.6 can't read such timestamps at all"),
    Difference("INVALID_ARGUMENT", "OK|ALREADY_EXISTS", r"Images/.* source_date_epoch.*", "1.6 hasn't got that field"),
    Difference(
        "INVALID_ARGUMENT", f"OK|NOT_FOUND|ALREADY_EXISTS|{PENDING}", r".*( |\[)long\]?",
        "names, keys, references, filters and labels have a length that they may have at most",
    ),
    Difference(
        "INVALID_ARGUMENT", "OK|ALREADY_EXISTS|NOT_FOUND", r".*labels\[empty\]",
        "no label is kept without a key: all say so"
    ),
    Difference(
        "INVALID_ARGUMENT", "OK|NOT_FOUND", r"Namespaces/.*( name|\.name|filter) .*|Namespaces/\w+ nothing",
        "a namespace's name and filter are looked at whatever is done by them",
    ),
    Difference(
        "INVALID_ARGUMENT", "OK|NOT_FOUND", r"(Diff/Apply|Images/Delete|Content/Write) .*(digest|expected) .*",
        "what is no digest isn't looked for",
    ),
    Difference(
        "INVALID_ARGUMENT", "OK|NOT_FOUND", r"Leases/\w+ (resource\.)?id (nul|empty)", "a lease's id can be printed"
    ),
    Difference(
        "INVALID_ARGUMENT|FAILED_PRECONDITION|UNIMPLEMENTED", "ALREADY_EXISTS|NOT_FOUND",
        r"Tasks/(Create (runtime_path|task_api_address) .*|(Checkpoint options|Exec spec) .*|Update nothing)"
        r"|Leases/\w+Resource nothing|Snapshots/Commit key empty",
        "what is wrong with a request comes before what it is about",
    ),
    Difference("INVALID_ARGUMENT", "OK", r"Tasks/ResizePty (width|height) .*", "a terminal has 65535 columns at most"),
    Difference(
        "INVALID_ARGUMENT|INTERNAL|NOT_FOUND", "UNIMPLEMENTED", r"Introspection/PluginInfo .*", "1.6 hasn't got it"
    ),
    Difference(
        "INVALID_ARGUMENT|FAILED_PRECONDITION", "UNIMPLEMENTED", r"Snapshots/Cleanup .*", "1.6's overlayfs hasn't it"
    ),
    Difference("OK", "INVALID_ARGUMENT", r".* filters slash", "a field's name may have a / in it"),
    Difference("FAILED_PRECONDITION", "OK", "Diff/Diff nothing", "between nothing and nothing there is no layer"),
    Difference(
        "NOT_FOUND|INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", r"(Content/Status ref|Tasks/Exec exec_id) long",
        "a sentence isn't longer than a client reads", sometimes=True,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("h"), "content", "snapshot", "network") as made:
        yield made


@pytest.fixture(scope="module")
def real() -> Iterator[containerd.Containerd]:
    """Debian's."""
    with containerd.running() as made:
        yield made


@pytest.fixture
async def channel(gateway: GatewayNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{gateway.socket}") as opened:
        yield opened


@pytest.fixture(scope="module")
def told() -> Outcomes:
    """What the gateway has answered so far."""
    return {}


def services() -> list[ServiceDescriptor]:
    return [one.service for one in SERVICERS]


def spec(gateway: GatewayNode, whose: str) -> dict[str, Any]:
    made = bundle.spec(SLEEPS)
    made["linux"]["cgroupsPath"] = f"/{gateway.namespace}/{whose}"
    return made


async def ask(channel: grpc.aio.Channel, gateway: GatewayNode, whose: str, wanted: list[ServiceDescriptor]) -> Outcomes:
    """Every try on a server, by name."""
    running, still = spec(gateway, whose), spec(gateway, f"{whose}-still")
    await furnish(channel, gateway.namespace, running, still, gateway.mounts)
    every = [
        one for one in tries(wanted, gateway.namespace, bases(running)) if one.name not in ENDS_IT or whose == "ours"
    ]
    found = await outcomes(channel, every)
    assert len({one.name for one in found}) == len(found)
    return {one.name: found[one] for one in every}


def logs(gateway: GatewayNode) -> str:
    return "".join(one.log.read_text() for one in gateway.node.services)


async def test_whatever_is_wrong_is_refused_by_a_code_that_says_so(
    gateway: GatewayNode, channel: grpc.aio.Channel, told: Outcomes
) -> None:
    told |= await ask(channel, gateway, "ours", services())
    assert len(told) > 2000
    wrong = {
        name: answer
        for name, answer in told.items()
        if answer[0] in ("UNKNOWN", "DATA_LOSS", "ABORTED", "CANCELLED")
        or (answer[0] == "INTERNAL") != (name.partition(" ")[2] == "garbage")  # grpc-go's code for what is no message
        or (answer[0] == "UNAVAILABLE" and not name.startswith("Transfer/"))  # its registry isn't there
        or (answer[0] == PENDING and not name.startswith("Events/Subscribe"))
    }
    assert not wrong
    codes = Counter(code for code, _ in told.values())
    assert codes["INVALID_ARGUMENT"] > codes["OK"]


def test_none_of_it_is_an_error_of_a_service(gateway: GatewayNode, told: Outcomes) -> None:
    assert told
    log = logs(gateway)
    assert "Traceback" not in log
    assert "call.failed" not in log
    assert "bus.lost" not in log


async def test_the_answers_are_containerds_but_where_they_differ_on_purpose(
    gateway: GatewayNode, told: Outcomes, real: containerd.Containerd
) -> None:
    of_its_time = [one for one in services() if not any(f".{name}." in one.full_name for name in SINCE_1_7)]
    async with grpc.aio.insecure_channel(f"unix:{real.socket}") as opened:
        try:
            theirs = await ask(opened, gateway, "theirs", of_its_time)
        finally:
            real.ctr("-n", gateway.namespace, "tasks", "rm", "-f", CONTAINER)
    assert len(theirs) > 1500
    unlike = {
        f"{name}: {told[name]}, theirs {answer}"
        for name, answer in theirs.items()
        if told[name][0] != answer[0] and not reasons(name, told[name][0], answer[0])
    }
    assert not unlike, "\n".join(unlike)
    used = {why for name, answer in theirs.items() for why in reasons(name, told[name][0], answer[0])}
    assert {one.why for one in DIFFERENCES if not one.sometimes} <= used


def reasons(name: str, ours: str, theirs: str) -> list[str]:
    """Why the two may differ."""
    return [
        one.why
        for one in DIFFERENCES
        if ours != theirs
        and re.fullmatch(one.ours, ours)
        and re.fullmatch(one.theirs, theirs)
        and re.fullmatch(one.what, name)
    ]


# --------------------------------------------------------------------------------------------------- masks of updates


def updates() -> list[tuple[str, type[Message], type[Message], Message, list[str]]]:
    """Every Update: its method, its request and reply, what it is asked with, and the paths that are tried."""
    labels = {"a": "1", "b": "", "new": "3"}
    maps = ["labels", "labels.a", "labels.b", "labels.new", "labels.not", "Labels.a", "label"]
    changed = bundle.spec(["false"])
    return [
        (
            "containers.v1.Containers/Update", containers.UpdateContainerRequest, containers.UpdateContainerResponse,
            containers.UpdateContainerRequest(
                container=containers.Container(
                    id="masked", image="new", labels=labels, spec=document(SPEC, changed), runtime={"name": RUNC_V2},
                    snapshot_key="new", extensions={"x": packed(target)},
                )
            ),
            [*maps, "image", "spec", "extensions", "extensions.x", "extensions", "snapshotkey",
             "snapshot_key", "snapshotter", "runtime", "runtime.name", "id", "created_at"],
        ),
        (
            "content.v1.Content/Update", content.UpdateRequest, content.UpdateResponse,
            content.UpdateRequest(info=content.Info(digest=DIGEST, labels=labels, size=1)),
            [*maps, "size", "digest", "created_at"],
        ),
        (
            "images.v1.Images/Update", images.UpdateImageRequest, images.UpdateImageResponse,
            images.UpdateImageRequest(
                image=images.Image(
                    name=IMAGE, labels=labels,
                    target=Descriptor(media_type="x/new", digest=DIGEST, size=7, annotations={"n": "1"}),
                )
            ),
            [*maps, "target", "name", "target.size", "created_at"],
        ),
        (
            "snapshots.v1.Snapshots/Update", snapshots.UpdateSnapshotRequest, snapshots.UpdateSnapshotResponse,
            snapshots.UpdateSnapshotRequest(
                snapshotter="overlayfs", info=snapshots.Info(name=ACTIVE, labels=labels, parent="new")
            ),
            [*maps, "parent", "kind", "name"],
        ),
    ]  # fmt: skip


async def masked(channel: grpc.aio.Channel, namespace: str) -> dict[str, str]:
    """What each path, none, and two at once make of a record, one after another: the reply without its times."""
    metadata = (("containerd-namespace", namespace),)
    record = containers.Container(id="masked", runtime={"name": RUNC_V2}, spec=document(SPEC, bundle.spec(["true"])))
    record.spec.value = b"{}"
    made = containers.CreateContainerRequest(container=record)
    await rpc(channel, f"/{SERVICES}.containers.v1.Containers/Create", made, metadata=metadata)
    found: dict[str, str] = {}
    for method, kind, reply, request, paths in updates():
        for mask in [[path] for path in paths] + [["labels.a", "nothing"], ["labels.new", "labels"], []]:
            asked = kind()
            asked.CopyFrom(request)
            asked.update_mask.paths.extend(mask)  # type: ignore[attr-defined]
            if method.startswith("containers"):
                asked.container.spec.value = b'{"ociVersion": "1.0.0"}'  # type: ignore[attr-defined]
            name = f"{method} {mask}"
            try:
                answer = await rpc(channel, f"/{SERVICES}.{method}", asked, reply=reply, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                found[name] = error.code().name
                continue
            [(_, told)] = answer.ListFields()
            told.ClearField("created_at")
            told.ClearField("updated_at")
            found[name] = str(told)
    return found


async def test_every_path_of_a_mask_changes_what_it_changes_with_containerd(
    gateway: GatewayNode, channel: grpc.aio.Channel, real: containerd.Containerd
) -> None:
    """On what the tests before this one have left, which is the same on both."""
    async with grpc.aio.insecure_channel(f"unix:{real.socket}") as opened:
        theirs = await masked(opened, gateway.namespace)
    ours = await masked(channel, gateway.namespace)
    assert len(theirs) > 50
    for name, answer in theirs.items():
        assert ours[name] == answer or (answer == "UNKNOWN" and ours[name] == "INVALID_ARGUMENT"), name


# ------------------------------------------------------------------------------------------------------------- sizes


async def test_a_specification_larger_than_the_bus_carries_is_refused_and_says_why(gateway: GatewayNode) -> None:
    async with gateway.calls() as calls:
        record = calls.container("large")
        record.spec.value = b'{"annotations": {"x": "' + b"x" * (2 << 20) + b'"}}'
        request = containers.CreateContainerRequest(container=record)
        code, sentence = await calls.refused(f"{CONTAINERS}/Create", request)
        assert (code, "max_payload" in sentence) == ("RESOURCE_EXHAUSTED", True)
        assert (await calls.refused(f"{CONTAINERS}/Get", containers.GetContainerRequest(id="large")))[0] == "NOT_FOUND"


async def test_a_list_is_as_large_as_it_is(gateway: GatewayNode) -> None:
    """Whatever one message of the bus carries; and by the stream, whatever a client takes at once."""
    options = [("grpc.max_receive_message_length", 64 << 20)]
    async with gateway.calls() as calls:
        spec = b'{"annotations": {"x": "' + b"x" * (900 << 10) + b'"}}'
        ids = [f"many-{number:02}" for number in range(24)]
        for id in ids:
            record = calls.container(id)
            record.spec.value = spec
            await calls.make_of(record)
        wanted = containers.ListContainersRequest(filters=["id~=^many-"]).SerializeToString()
        async with grpc.aio.insecure_channel(f"unix:{gateway.socket}", options=options) as wide:
            data = await wide.unary_unary(f"{CONTAINERS}/List")(wanted, metadata=calls.metadata, timeout=20)
        assert len(data) > 20 << 20
        told = containers.ListContainersResponse.FromString(data).containers
        assert [(one.id, one.spec.value == spec) for one in told] == [(id, True) for id in ids]
        streamed = [
            containers.ListContainerMessage.FromString(one).container.id
            async for one in calls.channel.unary_stream(f"{CONTAINERS}/ListStream")(wanted, metadata=calls.metadata)
        ]
        assert streamed == ids
        for id in ids:
            await calls.ask(f"{CONTAINERS}/Delete", containers.DeleteContainerRequest(id=id))


# ------------------------------------------------------------------------------------------ one at a time, and closely


async def test_a_name_as_long_as_it_may_be_is_told_and_the_bus_goes_on(
    gateway: GatewayNode, channel: grpc.aio.Channel
) -> None:
    """A subject that holds all of it would be longer than the bus takes: it would end the service's connection."""
    metadata = (("containerd-namespace", gateway.namespace),)
    async with gateway.calls() as calls, calls.events() as told:
        for name in ("ä" * 2000, "." * 4096):
            made = images.CreateImageRequest(image=images.Image(name=name, target=target))
            await rpc(channel, f"/{SERVICES}.images.v1.Images/Create", made, metadata=metadata)
        key = "ö" * 1000
        made_of = snapshots.PrepareSnapshotRequest(snapshotter="overlayfs", key=key)
        await rpc(channel, f"/{SERVICES}.snapshots.v1.Snapshots/Prepare", made_of, metadata=metadata)
        await until(lambda: {"/images/create", "/snapshot/prepare"} <= {one.topic for one in told})
        created = [ImageCreate.FromString(one.event.value).name for one in told if one.topic == "/images/create"]
        prepared = [SnapshotPrepare.FromString(one.event.value).key for one in told if one.topic == "/snapshot/prepare"]
    assert (created, prepared) == (["ä" * 2000, "." * 4096], [key])
    assert "bus.lost" not in logs(gateway)


async def test_a_published_topic_has_any_number_of_components(gateway: GatewayNode, channel: grpc.aio.Channel) -> None:
    topic = "/" + "/".join(["x" * 70] * 200)
    metadata = (("containerd-namespace", gateway.namespace),)
    async with gateway.calls() as calls, calls.events() as told:
        event = PublishRequest(topic=topic, event=packed(target))
        await rpc(channel, f"{EVENTS}/Publish", event, metadata=metadata)
        await until(lambda: [one.topic for one in told] == [topic])


async def test_a_sentence_is_no_longer_than_clients_read(gateway: GatewayNode, channel: grpc.aio.Channel) -> None:
    for letter in ("x", "ä"):
        request = images.GetImageRequest(name=letter * 3000)
        metadata = (("containerd-namespace", gateway.namespace),)
        code, sentence = await refusal(channel, f"/{SERVICES}.images.v1.Images/Get", request, metadata=metadata)
        assert code == "NOT_FOUND"
        assert sentence.endswith("…")
        assert len(sentence.encode()) < 2100
