"""Containers and tasks through the gateway, as containerd's clients ask for them, in messages of gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from shoal_bus.api import runtime
from shoal_bus.client import Client
from shoal_bus.errors import NotFound
from shoal_gateway.proto.containerd.services.containers.v1 import containers_pb2 as containers
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.services.tasks.v1 import tasks_pb2 as tasks
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope
from shoal_gateway.proto.containerd.types.mount_pb2 import Mount

from tests.support import bundle as bundles
from tests.support.gateway import refusal, rpc, socket_of, until
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.runtime import of_containers

CONTAINERS = "/containerd.services.containers.v1.Containers"
TASKS = "/containerd.services.tasks.v1.Tasks"
EVENTS = "/containerd.services.events.v1.Events"
RUNC_V2 = "io.containerd.runc.v2"
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
OTHER_RUNTIME = "otherrunc"
CHECKPOINTING_RUNTIME = "checkpointing-runc"
_CHECKPOINTING = """#!/bin/sh
# CRIU can't dump processes on every kernel that tests run on. This does what runc has it do: it writes image files,
# and starts a container only where they are; all else is runc.
verb= images= left=$#
while [ $left -gt 0 ]; do
    one=$1; shift; left=$((left - 1))
    case "$one" in
        --image-path) images=$1; shift; left=$((left - 1)); continue ;;
        --leave-running) continue ;;
        checkpoint) verb=$one ;;
        restore) verb=$one one=run ;;
    esac
    set -- "$@" "$one"
done
case "$verb" in
    checkpoint) echo core >"$images/core-1.img" && echo '[]' >"$images/descriptors.json"; exit ;;
    restore) [ "$(cat "$images/core-1.img")" = core ] || exit 1 ;;
esac
exec runc "$@"
"""
SLEEPS = ["sleep", "600"]


def document(type_url: str, value: Any) -> AnyMessage:
    """A document of OCI's as Go's clients pack it."""
    return AnyMessage(type_url=type_url, value=json.dumps(value).encode())


class GatewayNode:
    """A node with a gateway, and a namespace that is nobody else's."""

    def __init__(self, node: TestNode) -> None:
        self.node, self.socket = node, socket_of(node)
        self.namespace = f"shoalgw{secrets.token_hex(4)}"
        self.rootfs = bundles.busybox_rootfs(node.directory / "rootfs")

    def spec(self, *args: str, terminal: bool = False, **process: Any) -> dict[str, Any]:
        spec = bundles.spec(args, terminal=terminal, **process)
        spec["linux"]["cgroupsPath"] = f"/{self.namespace}/{secrets.token_hex(6)}"
        return spec

    @property
    def mounts(self) -> list[Mount]:
        return [Mount(type=one.type, source=one.source, options=one.options) for one in bundles.bind(self.rootfs)]

    @asynccontextmanager
    async def calls(self) -> AsyncIterator[Calls]:
        """A client of the gateway for a block."""
        limit = [("grpc.max_receive_message_length", 16 << 20)]  # what containerd's clients take
        async with grpc.aio.insecure_channel(f"unix:{self.socket}", options=limit) as channel:
            yield Calls(channel, self)

    async def clean(self) -> None:
        """Removes every container, and asserts that nothing is left of them."""
        async with Client.open(self.node.natsd.address, self.node.name, self.namespace) as client:
            for container in await client.collect(runtime.CONTAINER_LIST, runtime.ListContainers(specs=False)):
                with suppress(NotFound):
                    await client.call(runtime.CONTAINER_REMOVE, runtime.RemoveContainer(id=container.id, force=True))
        deadline = time.monotonic() + 15
        while (left := of_containers(self.node)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        left += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{self.namespace}/*/")]
        assert not left, "left behind:\n  " + "\n  ".join(left)


class Calls:
    """The methods of both services, on one channel, in the node's namespace."""

    def __init__(self, channel: grpc.aio.Channel, node: GatewayNode) -> None:
        self.channel, self.node = channel, node
        self.metadata = (("containerd-namespace", node.namespace),)

    async def ask(self, method: str, request: Message | bytes, reply: type[Message] | None = None, **more: Any) -> Any:
        return await rpc(self.channel, method, request, reply=reply, metadata=self.metadata, **more)

    async def refused(self, method: str, request: Message | bytes) -> tuple[str, str]:
        return await refusal(self.channel, method, request, metadata=self.metadata)

    # -------------------------------------------------------------------------------------------------- containers

    def container(self, id: str, *args: str, **more: Any) -> containers.Container:
        """A container of busybox, as it is asked for."""
        asked = {"spec": document(SPEC, self.node.spec(*(args or SLEEPS))), **more}
        return containers.Container(id=id, runtime=asked.pop("runtime", {"name": RUNC_V2}), **asked)

    async def make(self, id: str, *args: str, **more: Any) -> containers.Container:
        return await self.make_of(self.container(id, *args, **more))

    async def make_of(self, asked: containers.Container) -> containers.Container:
        request = containers.CreateContainerRequest(container=asked)
        reply = await self.ask(f"{CONTAINERS}/Create", request, containers.CreateContainerResponse)
        return reply.container  # type: ignore[no-any-return]

    async def container_of(self, id: str) -> containers.Container:
        request = containers.GetContainerRequest(id=id)
        return (await self.ask(f"{CONTAINERS}/Get", request, containers.GetContainerResponse)).container  # type: ignore[no-any-return]

    async def update(self, asked: containers.Container, *paths: str) -> containers.Container:
        request = containers.UpdateContainerRequest(container=asked)
        request.update_mask.paths.extend(paths)
        reply = await self.ask(f"{CONTAINERS}/Update", request, containers.UpdateContainerResponse)
        return reply.container  # type: ignore[no-any-return]

    async def ids(self, *filters: str) -> list[str]:
        request = containers.ListContainersRequest(filters=filters)
        reply = await self.ask(f"{CONTAINERS}/List", request, containers.ListContainersResponse)
        return [container.id for container in reply.containers]

    # ------------------------------------------------------------------------------------------------------- tasks

    async def create(self, id: str, *args: str, container: dict[str, Any] | None = None, **more: Any) -> int:
        """A container and its task, created; the pid."""
        await self.make(id, *args, **(container or {}))
        return await self.create_task(id, **more)

    async def create_task(self, id: str, **more: Any) -> int:
        request = tasks.CreateTaskRequest(container_id=id, rootfs=self.node.mounts, **more)
        reply = await self.ask(f"{TASKS}/Create", request, tasks.CreateTaskResponse)
        return int(reply.pid)

    async def run(self, id: str, *args: str, **more: Any) -> int:
        """The same, started."""
        pid = await self.create(id, *args, **more)
        assert await self.start(id) == pid
        return pid

    async def start(self, id: str, exec_id: str = "") -> int:
        request = tasks.StartRequest(container_id=id, exec_id=exec_id)
        return int((await self.ask(f"{TASKS}/Start", request, tasks.StartResponse)).pid)

    async def exec(self, id: str, exec_id: str, *args: str, terminal: bool = False, **streams: str) -> None:
        process = {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "terminal": terminal}
        request = tasks.ExecProcessRequest(
            container_id=id, exec_id=exec_id, spec=document(PROCESS, process), terminal=terminal, **streams
        )
        await self.ask(f"{TASKS}/Exec", request)

    async def wait(self, id: str, exec_id: str = "") -> tasks.WaitResponse:
        request = tasks.WaitRequest(container_id=id, exec_id=exec_id)
        return await self.ask(f"{TASKS}/Wait", request, tasks.WaitResponse, timeout=30)  # type: ignore[no-any-return]

    async def get(self, id: str, exec_id: str = "") -> Any:
        request = tasks.GetRequest(container_id=id, exec_id=exec_id)
        return (await self.ask(f"{TASKS}/Get", request, tasks.GetResponse)).process

    async def kill(self, id: str, signal: int = 9, exec_id: str = "", all: bool = False) -> None:
        request = tasks.KillRequest(container_id=id, exec_id=exec_id, signal=signal, all=all)
        await self.ask(f"{TASKS}/Kill", request)

    async def delete(self, id: str, exec_id: str = "") -> tasks.DeleteResponse:
        if exec_id:
            request: Message = tasks.DeleteProcessRequest(container_id=id, exec_id=exec_id)
            return await self.ask(f"{TASKS}/DeleteProcess", request, tasks.DeleteResponse)  # type: ignore[no-any-return]
        request = tasks.DeleteTaskRequest(container_id=id)
        return await self.ask(f"{TASKS}/Delete", request, tasks.DeleteResponse)  # type: ignore[no-any-return]

    async def end(self, id: str) -> None:
        """Kills a task and removes it with its container."""
        await self.kill(id)
        await self.wait(id)
        await self.delete(id)
        await self.ask(f"{CONTAINERS}/Delete", containers.DeleteContainerRequest(id=id))

    async def end_created(self, id: str) -> None:
        """Removes a task that isn't started, with its container."""
        await self.delete(id)
        await self.ask(f"{CONTAINERS}/Delete", containers.DeleteContainerRequest(id=id))

    # ------------------------------------------------------------------------------------------------------ events

    @asynccontextmanager
    async def events(self, filter: str = "") -> AsyncIterator[list[Envelope]]:
        """The events of the namespace from the beginning of a block on, as they come."""
        log = self.node.node.of("gateway").log
        before = log.read_text().count("events.subscribed")
        told: list[Envelope] = []
        stream = self.channel.unary_stream(
            f"{EVENTS}/Subscribe",
            request_serializer=SubscribeRequest.SerializeToString,
            response_deserializer=Envelope.FromString,
        )(SubscribeRequest(filters=[filter or f"namespace=={self.node.namespace}"]))

        async def follow() -> None:
            async for envelope in stream:
                told.append(envelope)  # noqa: PERF401 (others look at the list meanwhile)

        following = asyncio.create_task(follow())
        try:
            await until(lambda: log.read_text().count("events.subscribed") > before)
            yield told
        finally:
            stream.cancel()
            await asyncio.gather(following, return_exceptions=True)


@contextmanager
def gateway_node(
    directory: Path, *services: str, gateway: tuple[str, ...] = (), bus: str = ""
) -> Iterator[GatewayNode]:
    """A node with a runtime service, a gateway and other `services` for a block; nothing is left of its containers.

    `gateway` are arguments of that one, `bus` is further configuration of nats-server.

    There are three OCI runtimes on its PATH: runc, runc by another name, and runc with something in CRIU's place.
    """
    programs = directory / "bin"
    programs.mkdir()
    (programs / OTHER_RUNTIME).symlink_to(shutil.which("runc") or "runc")
    (programs / CHECKPOINTING_RUNTIME).write_text(_CHECKPOINTING)
    (programs / CHECKPOINTING_RUNTIME).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    with NatsServer(directory / "nats", extra=bus) as natsd, TestNode(directory, natsd, path=path) as node:
        node.start(*services, "runtime")
        node.start("gateway", arguments=gateway)
        made = GatewayNode(node)
        try:
            yield made
        finally:
            asyncio.run(made.clean())
