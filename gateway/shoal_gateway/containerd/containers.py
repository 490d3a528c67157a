"""containerd.services.containers.v1.Containers: the runtime service has their records."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import runtime
from shoal_bus.errors import InvalidArgument
from shoal_bus.identifiers import check_identifier
from shoal_bus.types import AnyMessage

from shoal_gateway import typeurls
from shoal_gateway.call import Call
from shoal_gateway.convert import labels_of, paths_of, quote, sought, timestamp
from shoal_gateway.errors import worded
from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as pb
from shoal_gateway.rpc import Servicer

_FIELDS = {
    "labels": "labels", "spec": "spec", "extensions": "extensions", "image": "image", "snapshotkey": "snapshot_key",
}  # fmt: skip
"""What may be changed, by containerd's names in field masks, and the bus's."""


class Containers(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Containers"]

    async def get(self, call: Call, request: pb.GetContainerRequest) -> pb.GetContainerResponse:
        missing = f"container {quote(request.id)} in namespace {quote(call.namespace)}"
        wanted = runtime.GetContainer(id=sought(request.id, missing), packed=True)
        with worded(missing):
            return pb.GetContainerResponse(container=_told(await call.ask(runtime.CONTAINER_GET, wanted)))

    async def list(self, call: Call, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
        found = call.items(runtime.CONTAINER_LIST, _wanted(request))
        return pb.ListContainersResponse(containers=[_told(one) async for one in found])

    async def list_stream(
        self, call: Call, request: pb.ListContainersRequest
    ) -> AsyncGenerator[pb.ListContainerMessage, None]:
        """One at a time, however many there are."""
        async for one in call.items(runtime.CONTAINER_LIST, _wanted(request)):
            yield pb.ListContainerMessage(container=_told(one))

    async def create(self, call: Call, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        """Whatever the specification, the options and the extensions hold is kept: the first task shows what it is."""
        asked = request.container
        if not asked.runtime.name:
            raise InvalidArgument("container.Runtime.Name must be set")
        if asked.snapshot_key and not asked.snapshotter:
            raise InvalidArgument("container.Snapshotter must be set if container.SnapshotKey is set")
        wanted = runtime.CreateContainer(
            id=_named(asked.id),
            image=asked.image,
            labels=labels_of(asked.labels),
            runtime=asked.runtime.name,
            options=_options(asked.runtime.options),
            packed_options=typeurls.kept(asked.runtime.options),
            snapshotter=asked.snapshotter,
            snapshot_key=asked.snapshot_key,
            sandbox=asked.sandbox,
            packed_spec=_spec(asked),
            extensions=_extensions(asked.extensions),
        )
        with worded("", f'container "{asked.id}"'):
            made = await call.ask(runtime.CONTAINER_CREATE, wanted)
        return pb.CreateContainerResponse(container=_told(made.model_copy(update={"packed_spec": wanted.packed_spec})))

    async def update(self, call: Call, request: pb.UpdateContainerRequest) -> pb.UpdateContainerResponse:
        """Without a mask all that may be changed is replaced, and what may not must be what it is."""
        asked = request.container
        if not asked.id:
            raise InvalidArgument("Container.ID must not be empty")
        name = sought(asked.id, f"container {quote(asked.id)}")
        maps = ("labels", "extensions")
        paths = paths_of(request.update_mask, f"container {name!r}", whole=tuple(_FIELDS), maps=maps)
        fields = paths or list(_FIELDS)
        wanted = runtime.UpdateContainer(
            id=name,
            image=asked.image,
            labels=labels_of(asked.labels),
            runtime=None if paths else asked.runtime.name,
            snapshotter=None if paths else asked.snapshotter,
            snapshot_key=asked.snapshot_key,
            packed_spec=_spec(asked) if "spec" in fields else None,
            extensions=_extensions(asked.extensions),
            packed=True,
            fields=[_FIELDS.get(path, path) for path in fields],
        )
        with worded(f'container "{name}"'):
            return pb.UpdateContainerResponse(container=_told(await call.ask(runtime.CONTAINER_UPDATE, wanted)))

    async def delete(self, call: Call, request: pb.DeleteContainerRequest) -> Empty:
        wanted = runtime.ContainerRequest(id=sought(request.id, missing := f"container {request.id}"))
        with worded(missing):
            await call.ask(runtime.CONTAINER_DELETE, wanted)
        return Empty()


def _named(id: str) -> str:
    return check_identifier(id, "container.ID")


def _wanted(request: pb.ListContainersRequest) -> runtime.ListContainers:
    return runtime.ListContainers(filters=list(request.filters), packed=True)


def _spec(asked: pb.Container) -> AnyMessage:
    if not asked.HasField("spec"):
        raise InvalidArgument("container.Spec must be set")
    return typeurls.kept(asked.spec)


def _options(packed: AnyProto) -> runtime.RuncOptions:
    """Runc's; others are only kept, and refused when a task is to be made with them."""
    if packed.type_url.rpartition("/")[2] != typeurls.RUNC_OPTIONS:
        return runtime.RuncOptions()
    return typeurls.runc_options(typeurls.message_of(packed, Options, "container.Runtime.Options"))


def _extensions(asked: Mapping[str, AnyProto]) -> dict[str, AnyMessage]:
    if "" in asked:
        raise InvalidArgument("container.Extension keys must not be zero-length")
    return {name: typeurls.kept(extension) for name, extension in asked.items()}


def _told(container: runtime.Container) -> pb.Container:
    told = pb.Container(
        id=container.id,
        labels=container.labels,
        image=container.image,
        runtime=_runtime(container),
        snapshotter=container.snapshotter,
        snapshot_key=container.snapshot_key,
        created_at=timestamp(container.created_at),
        updated_at=timestamp(container.updated_at),
        extensions={name: typeurls.told(extension) for name, extension in container.extensions.items()},
        sandbox=container.sandbox,
    )
    if container.packed_spec is not None:
        told.spec.type_url, told.spec.value = container.packed_spec.type_url, container.packed_spec.value
    return told


def _runtime(container: runtime.Container) -> pb.Container.Runtime:
    """As its client named it. Shoal's own clients name an OCI runtime, which is runc's binary for containerd's."""
    packed = container.packed_options
    if packed is None:
        options = Options(binary_name="" if container.runtime == "runc" else container.runtime)
        packed = AnyMessage(type_url=typeurls.RUNC_OPTIONS, value=options.SerializeToString())
        return pb.Container.Runtime(name=runtime.RUNC_V2, options=typeurls.told(packed))
    if not packed.type_url and not packed.value:
        return pb.Container.Runtime(name=container.runtime)
    return pb.Container.Runtime(name=container.runtime, options=typeurls.told(packed))
