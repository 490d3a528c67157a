"""containerd's protocol: its files lie where a reader looks for them, and say what is in them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import shoal_gateway
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.symbol_database import Default
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options

ROOT = Path(shoal_gateway.__file__).parent / "proto"
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))

ELSEWHERE = {"containerd/events/image.proto": "containerd.services.images.v1"}
"""What lies apart from its package: the images' events have the images service's."""

SERVICES = {
    *(f"containerd.services.{name}.v1.{name.capitalize()}" for name in (
        "containers", "content", "diff", "events", "images", "introspection", "leases", "mounts", "namespaces",
        "snapshots", "streaming", "tasks", "transfer", "version",
    )),
    "containerd.services.events.ttrpc.v1.Events",
    "containerd.services.sandbox.v1.Controller",
    "containerd.services.sandbox.v1.Store",
}  # fmt: skip
"""What containerd 2.x serves on its sockets, health and reflection aside."""

STREAMS = {
    "containerd.services.containers.v1.Containers.ListStream": (False, True),
    "containerd.services.content.v1.Content.List": (False, True),
    "containerd.services.content.v1.Content.Read": (False, True),
    "containerd.services.content.v1.Content.Write": (True, True),
    "containerd.services.events.v1.Events.Subscribe": (False, True),
    "containerd.services.mounts.v1.Mounts.List": (False, True),
    "containerd.services.snapshots.v1.Snapshots.List": (False, True),
    "containerd.services.streaming.v1.Streaming.Stream": (True, True),
}
"""Methods that stream: what they are asked with, what they answer with. Every other is unary."""


def descriptor_of(file: str) -> FileDescriptor:
    module = importlib.import_module(f"shoal_gateway.proto.{file.removesuffix('.proto').replace('/', '.')}_pb2")
    descriptor = module.DESCRIPTOR
    assert isinstance(descriptor, FileDescriptor)
    return descriptor


def services() -> list[ServiceDescriptor]:
    return [service for file in FILES for service in descriptor_of(file).services_by_name.values()]


@pytest.mark.parametrize("file", FILES)
def test_a_file_lies_where_its_package_says(file: str) -> None:
    assert descriptor_of(file).package == ELSEWHERE.get(file, str(Path(file).parent).replace("/", "."))


def test_every_service_of_the_api_is_there_once() -> None:
    assert sorted(service.full_name for service in services()) == sorted(SERVICES)


def test_methods_stream_as_their_clients_do() -> None:
    methods = [method for service in services() for method in service.methods]
    streams = {method.full_name: (method.client_streaming, method.server_streaming) for method in methods}
    assert {name: kind for name, kind in streams.items() if any(kind)} == STREAMS


@pytest.mark.parametrize(
    "name",
    [
        "containerd.runc.v1.Options",
        "containerd.runc.v1.CheckpointOptions",
        "containerd.runc.v1.ProcessDetails",
        "runtimeoptions.v1.Options",
        "io.containerd.cgroups.v1.Metrics",
        "io.containerd.cgroups.v2.Metrics",
        "containerd.services.streaming.v1.StreamInit",
        "containerd.types.RuntimeRequest",
        "containerd.types.RuntimeInfo",
        "containerd.types.transfer.OCIRegistry",
        "containerd.types.transfer.ImageStore",
        "containerd.types.transfer.ImageImportStream",
        "containerd.types.transfer.ImageExportStream",
        "containerd.types.transfer.ContainerPath",
        "containerd.types.transfer.Progress",
        "containerd.types.transfer.AuthRequest",
        "containerd.types.transfer.AuthResponse",
        "containerd.types.transfer.Data",
        "containerd.types.transfer.WindowUpdate",
    ],
)
def test_what_clients_pack_is_found_by_its_type_url(name: str) -> None:
    for file in FILES:
        descriptor_of(file)
    assert Default().pool.FindMessageTypeByName(name).full_name == name


def test_the_runc_options_of_older_clients_are_read() -> None:
    # criu_path (8), which containerd 1.x had, between binary_name (6) and systemd_cgroup (9).
    data = b"\x32\x04crun" + b"\x42\x05/criu" + b"\x48\x01"
    read = Options.FromString(data)
    assert (read.binary_name, read.systemd_cgroup) == ("crun", True)
    # What isn't known is handed on as it came.
    assert Options.FromString(read.SerializeToString()) == read
    assert b"/criu" in read.SerializeToString()
