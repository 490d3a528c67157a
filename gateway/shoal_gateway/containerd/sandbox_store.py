"""containerd.services.sandbox.v1.Store: the runtime service has them."""

from __future__ import annotations

from typing import Any

from shoal_bus.api import runtime
from shoal_bus.identifiers import check_identifier
from shoal_bus.types import AnyMessage

from shoal_gateway.call import Call
from shoal_gateway.convert import timestamp
from shoal_gateway.proto.containerd.services.sandbox.v1 import sandbox_pb2 as pb
from shoal_gateway.proto.containerd.types.sandbox_pb2 import Sandbox
from shoal_gateway.rpc import Servicer
from shoal_gateway.typeurls import kept, told


class SandboxStore(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Store"]

    async def create(self, call: Call, request: pb.StoreCreateRequest) -> pb.StoreCreateResponse:
        made = await call.ask(runtime.SANDBOX_CREATE, runtime.CreateSandbox(**_asked(request.sandbox)))
        return pb.StoreCreateResponse(sandbox=_told(made))

    async def update(self, call: Call, request: pb.StoreUpdateRequest) -> pb.StoreUpdateResponse:
        wanted = runtime.UpdateSandbox(**_asked(request.sandbox), fields=list(request.fields))
        return pb.StoreUpdateResponse(sandbox=_told(await call.ask(runtime.SANDBOX_UPDATE, wanted)))

    async def delete(self, call: Call, request: pb.StoreDeleteRequest) -> pb.StoreDeleteResponse:
        await call.ask(runtime.SANDBOX_DELETE, _named(request.sandbox_id))
        return pb.StoreDeleteResponse()

    async def list(self, call: Call, request: pb.StoreListRequest) -> pb.StoreListResponse:
        asked = runtime.ListSandboxes(filters=list(request.filters))
        return pb.StoreListResponse(list=[_told(one) async for one in call.items(runtime.SANDBOX_LIST, asked)])

    async def get(self, call: Call, request: pb.StoreGetRequest) -> pb.StoreGetResponse:
        found = await call.ask(runtime.SANDBOX_GET, _named(request.sandbox_id))
        return pb.StoreGetResponse(sandbox=_told(found))


def _named(id: str) -> runtime.SandboxRequest:
    return runtime.SandboxRequest(id=check_identifier(id, "sandbox ID"))


def _asked(sandbox: Sandbox) -> dict[str, Any]:
    """What a client gives of a sandbox; its times are the store's."""
    return {
        "id": check_identifier(sandbox.sandbox_id, "sandbox ID"),
        "runtime": runtime.SandboxRuntime(name=sandbox.runtime.name, options=_given(sandbox.runtime, "options")),
        "spec": _given(sandbox, "spec"),
        "labels": dict(sandbox.labels),
        "extensions": {name: kept(one) for name, one in sandbox.extensions.items()},
        "sandboxer": sandbox.sandboxer,
    }


def _given(message: Sandbox | Sandbox.Runtime, field: str) -> AnyMessage | None:
    return kept(getattr(message, field)) if message.HasField(field) else None


def _told(sandbox: runtime.Sandbox) -> Sandbox:
    options, spec = sandbox.runtime.options, sandbox.spec
    return Sandbox(
        sandbox_id=sandbox.id,
        runtime=Sandbox.Runtime(name=sandbox.runtime.name, options=told(options) if options is not None else None),
        spec=told(spec) if spec is not None else None,
        labels=sandbox.labels,
        extensions={name: told(one) for name, one in sandbox.extensions.items()},
        sandboxer=sandbox.sandboxer,
        created_at=timestamp(sandbox.created_at),
        updated_at=timestamp(sandbox.updated_at),
    )
