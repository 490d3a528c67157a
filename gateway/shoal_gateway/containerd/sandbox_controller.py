"""containerd.services.sandbox.v1.Controller: groups of containers under one shim, which the runtime service runs.

Both of containerd's controllers, `podsandbox` and `shim`, stand for that one. As with containerd's shim for runc, there
is no process behind a sandbox (its pid is 0), and its tasks are served where all are.
"""

from __future__ import annotations

from shoal_bus.api import runtime
from shoal_bus.errors import InvalidArgument, NotFound, Unimplemented
from shoal_bus.identifiers import check_identifier
from shoal_bus.message import now

from shoal_gateway.call import Call
from shoal_gateway.plugins import host_platform
from shoal_gateway.proto.containerd.services.sandbox.v1 import sandbox_pb2 as pb
from shoal_gateway.rpc import Servicer

SANDBOXERS = ("podsandbox", "shim")
_STATES = {"created": "SANDBOX_NOTREADY", "ready": "SANDBOX_READY", "stopped": "SANDBOX_NOTREADY"}


class SandboxController(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Controller"]

    async def create(self, call: Call, request: pb.ControllerCreateRequest) -> pb.ControllerCreateResponse:
        """UNIMPLEMENTED for a root filesystem: only a sandbox with a process has use for one."""
        named = _named(request.sandboxer, request.sandbox_id)
        if request.rootfs:
            raise Unimplemented(f"sandbox {named.id}: no process of its own, so it can't have a root filesystem")
        await call.ask(
            runtime.SANDBOX_RUN,
            runtime.RunSandbox(
                id=named.id, sandboxer=request.sandboxer, netns_path=request.netns_path,
                annotations=dict(request.annotations),
            ),
        )  # fmt: skip
        return pb.ControllerCreateResponse(sandbox_id=named.id)

    async def start(self, call: Call, request: pb.ControllerStartRequest) -> pb.ControllerStartResponse:
        started = await call.ask(runtime.SANDBOX_START, _named(request.sandboxer, request.sandbox_id))
        told = pb.ControllerStartResponse(sandbox_id=started.id)
        told.created_at.FromDatetime(started.created_at)
        return told

    async def platform(self, call: Call, request: pb.ControllerPlatformRequest) -> pb.ControllerPlatformResponse:
        await call.ask(runtime.SANDBOX_STATUS, _named(request.sandboxer, request.sandbox_id))
        return pb.ControllerPlatformResponse(platform=host_platform())

    async def stop(self, call: Call, request: pb.ControllerStopRequest) -> pb.ControllerStopResponse:
        """Ends the sandbox's containers. One that isn't there is stopped, as with containerd."""
        named = _named(request.sandboxer, request.sandbox_id)
        wanted = runtime.StopSandbox(id=named.id, timeout=min(request.timeout_secs, 86400))
        try:
            await call.operate(runtime.SANDBOX_STOP, wanted)
        except NotFound:
            call.log.debug("sandbox.not_there", sandbox=named.id)
        return pb.ControllerStopResponse()

    async def wait(self, call: Call, request: pb.ControllerWaitRequest) -> pb.ControllerWaitResponse:
        ended = await call.ask(runtime.SANDBOX_WAIT, _named(request.sandboxer, request.sandbox_id))
        told = pb.ControllerWaitResponse(exit_status=ended.exit_status)
        if ended.exited_at is not None:
            told.exited_at.FromDatetime(ended.exited_at)
        return told

    async def status(self, call: Call, request: pb.ControllerStatusRequest) -> pb.ControllerStatusResponse:
        """One that isn't there has exited just now and has no state, as with containerd."""
        named = _named(request.sandboxer, request.sandbox_id)
        told = pb.ControllerStatusResponse(sandbox_id=named.id)
        try:
            found = await call.ask(runtime.SANDBOX_STATUS, named)
        except NotFound:
            told.exited_at.FromDatetime(now())
            return told
        told.state = _STATES[found.state]
        told.created_at.FromDatetime(found.created_at)
        if found.exited_at is not None:
            told.exited_at.FromDatetime(found.exited_at)
        if request.verbose:
            told.info.update({"netns_path": found.netns_path} if found.netns_path else {})
            told.info.update({f"annotations.{name}": value for name, value in found.annotations.items()})
        return told

    async def shutdown(self, call: Call, request: pb.ControllerShutdownRequest) -> pb.ControllerShutdownResponse:
        """Stops it, with its containers, if that hasn't been done, and forgets it."""
        named = _named(request.sandboxer, request.sandbox_id)
        await call.operate(runtime.SANDBOX_STOP, runtime.StopSandbox(id=named.id))
        await call.ask(runtime.SANDBOX_SHUTDOWN, named)
        return pb.ControllerShutdownResponse()

    async def metrics(self, call: Call, request: pb.ControllerMetricsRequest) -> pb.ControllerMetricsResponse:
        named = _named(request.sandboxer, request.sandbox_id)
        raise Unimplemented(f"sandbox {named.id}: no cgroup of its own; ask for the metrics of its containers' tasks")

    async def update(self, call: Call, request: pb.ControllerUpdateRequest) -> pb.ControllerUpdateResponse:
        """Nothing of what a sandbox is stored with concerns one that runs, so there is nothing to be passed on."""
        named = _named(request.sandboxer, request.sandbox_id)
        if not request.HasField("sandbox"):
            raise InvalidArgument("sandbox can not be nil")
        await call.ask(runtime.SANDBOX_STATUS, named)
        return pb.ControllerUpdateResponse()


def _named(sandboxer: str, id: str) -> runtime.SandboxRequest:
    """Empty is what clients of containerd 1.7 say, which had one controller."""
    if sandboxer and sandboxer not in SANDBOXERS:
        raise NotFound(f"failed to get sandbox controller by {sandboxer}")
    return runtime.SandboxRequest(id=check_identifier(id, "sandbox ID"))
