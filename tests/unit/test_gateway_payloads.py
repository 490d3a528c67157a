"""Events of the bus as containerd's envelopes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.struct_pb2 import Struct
from shoal_bus.api import content, network, runtime, snapshot
from shoal_bus.events import Event, Topic
from shoal_bus.types import Mount
from shoal_gateway.payloads import PAYLOADS, Forwarded, payload_of
from shoal_gateway.proto.containerd.events.task_pb2 import TaskExit
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

AT = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)


def event(topic: str, payload: dict[str, object], namespace: str = "default") -> Forwarded:
    return Forwarded(
        Event(node="n", namespace=namespace, service="s", topic=topic, timestamp=AT, payload=payload), sequence=1
    )


def test_an_exit_is_the_message_that_clients_know() -> None:
    exit = runtime.TaskExited(container_id="web-1", id="web-1", pid=7, exit_status=137, exited_at=AT)
    envelope = Envelope.FromString(event("/tasks/exit", exit.model_dump()).data)
    assert (envelope.topic, envelope.namespace) == ("/tasks/exit", "default")
    assert envelope.timestamp.ToDatetime(UTC) == AT
    assert envelope.event.type_url == "containerd.events.TaskExit"
    told = TaskExit.FromString(envelope.event.value)
    assert (told.container_id, told.pid, told.exit_status) == ("web-1", 7, 137)
    assert told.exited_at.ToDatetime(UTC) == AT


def test_images_events_have_the_package_of_the_images_service() -> None:
    envelope = Envelope.FromString(event("/images/create", {"name": "a", "labels": {"x": "y"}}).data)
    assert envelope.event.type_url == "containerd.services.images.v1.ImageCreate"


OWN = {"/content/rotten", "/events/published"}
"""Topics that containerd hasn't got."""


@pytest.mark.parametrize("module", [content, runtime, snapshot])
def test_every_topic_of_the_services_has_its_message_and_all_of_its_fields(module: object) -> None:
    for topic in [value for value in vars(module).values() if isinstance(value, Topic)]:
        if topic.name in OWN:
            continue
        known = {field.name for field in PAYLOADS[topic.name].DESCRIPTOR.fields}
        assert set(topic.payload.model_fields) <= known, topic.name


def test_nested_payloads_keep_their_shape() -> None:
    created = runtime.TaskCreated(
        container_id="c", bundle="/b", pid=1, io=runtime.TaskIO(stdout="/out", terminal=True),
        rootfs=[Mount(type="overlay", source="overlay", options=["lowerdir=/l"])],
    )  # fmt: skip
    forwarded = event("/tasks/create", created.model_dump())
    assert forwarded.payload.rootfs[0].options == ["lowerdir=/l"]  # type: ignore[attr-defined]
    assert forwarded.field(["event", "io", "stdout"]) == "/out"
    assert forwarded.field(["event", "io", "terminal"]) == "true"


def test_an_event_that_containerd_has_not_got_is_a_struct() -> None:
    payload = payload_of(network.NETWORKS_CREATE.name, {"id": "net-1", "path": "/run/netns/x", "at": AT})
    assert isinstance(payload, Struct)
    assert payload.fields["id"].string_value == "net-1"
    assert event("/networks/create", {"id": "net-1"}).field(["event", "id"]) == "net-1"


def test_a_payload_of_a_newer_service_is_told_as_far_as_it_is_known() -> None:
    assert payload_of("/tasks/start", {"container_id": "c", "pid": 3, "colour": "red"}).pid == 3  # type: ignore[attr-defined]


def test_filters_see_text_true_booleans_and_labels() -> None:
    one = event("/images/create", {"name": "busybox", "labels": {"io.kubernetes.pod": "p", "empty": ""}})
    assert one.field(["event", "name"]) == "busybox"
    assert one.field(["event", "labels", "io", "kubernetes", "pod"]) == "p"
    assert one.field(["event", "labels", "io.kubernetes.pod"]) == "p"
    assert one.field(["event", "labels", "none"]) is None
    assert one.field(["event", "nothing"]) is None
    assert one.field(["event"]) is None
    assert one.field(["topic"]) == "/images/create"


def test_an_event_of_the_whole_node_has_no_namespace() -> None:
    assert event("/networks/create", {"id": "x"}, namespace="").field(["namespace"]) is None


def test_what_happens_to_a_namespace_is_told_in_it() -> None:
    assert event("/namespaces/create", {"name": "tenant"}, namespace="").namespace == "tenant"
