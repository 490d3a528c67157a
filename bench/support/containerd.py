"""containerd, private to this run, and one long-lived client of its gRPC API."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from shoal_gateway.proto.containerd.events.task_pb2 import TaskExit
from shoal_gateway.proto.containerd.services.events.v1.events_pb2 import SubscribeRequest
from shoal_gateway.proto.containerd.types.event_pb2 import Envelope

from bench.support.side import Exited, Side

_START_SECONDS, _STOP_SECONDS, _SUBSCRIBE_SECONDS = 20.0, 10.0, 0.5
_OCI = "types.containerd.io/opencontainers/runtime-spec/1"
_SHIM = "containerd-shim-runc-v2"
_CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]

[grpc]
address = "{address}"

[debug]
level = "warn"
"""


class Daemon:
    """A running containerd: persistent files in `root`, the rest in `state`, its API on `address`."""

    def __init__(self, root: Path, state: Path) -> None:
        self.root, self.state = root, state
        self.address = state / "containerd.sock"
        self.log = state / "containerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        for directory in (self.root, self.state):
            directory.mkdir(parents=True, exist_ok=True)
        config = self.state / "config.toml"
        config.write_text(_CONFIG.format(root=self.root, state=self.state, address=self.address))
        binary = shutil.which("containerd")
        if binary is None:
            raise RuntimeError("containerd isn't there: apt-get install containerd")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "--config", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if self.address.exists() and self.ctr("version").returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError(f"containerd didn't start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._process = None

    def ctr(self, *arguments: str, namespace: str = "default") -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", str(self.address), "--namespace", namespace, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def pull(self, namespace: str, reference: str) -> None:
        done = self.ctr("images", "pull", "--plain-http", reference, namespace=namespace)
        if done.returncode != 0:
            raise RuntimeError(f"ctr images pull: {done.stderr.strip()}")


@contextmanager
def running(root: Path, state: Path) -> Iterator[Daemon]:
    """containerd for the length of a block."""
    daemon = Daemon(root, state)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()


class Containerd(Side):
    """containerd by its gRPC API. `parent` is the image's topmost snapshot."""

    name = "containerd"

    def __init__(
        self, daemon: Daemon, channel: grpc.aio.Channel, messages: dict[str, ModuleType], mark: str, parent: str
    ) -> None:
        self.daemon, self.cgroup, self.namespace, self._parent = daemon, mark, mark, parent
        self._channel, self._messages = channel, messages
        self._metadata = (("containerd-namespace", self.namespace),)
        containers, snapshots, tasks = messages["containers"], messages["snapshots"], messages["tasks"]
        self._prepare = self._method("snapshots", "Prepare", snapshots.PrepareSnapshotResponse)
        self._remove = self._method("snapshots", "Remove", Empty)
        self._create_container = self._method("containers", "Create", containers.CreateContainerResponse)
        self._delete_container = self._method("containers", "Delete", Empty)
        self._create = self._method("tasks", "Create", tasks.CreateTaskResponse)
        self._start = self._method("tasks", "Start", tasks.StartResponse)
        self._wait = self._method("tasks", "Wait", tasks.WaitResponse)
        self._kill = self._method("tasks", "Kill", Empty)
        self._delete = self._method("tasks", "Delete", tasks.DeleteResponse)
        self._exec = self._method("tasks", "Exec", Empty)
        self._delete_process = self._method("tasks", "DeleteProcess", tasks.DeleteResponse)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, daemon: Daemon, messages: dict[str, ModuleType], mark: str, parent: str
    ) -> AsyncIterator[Containerd]:
        async with grpc.aio.insecure_channel(f"unix:{daemon.address}") as channel:
            yield cls(daemon, channel, messages, mark, parent)

    def _method(self, service: str, method: str, reply: type[Any]) -> Any:
        call = self._channel.unary_unary(
            f"/containerd.services.{service}.v1.{service.capitalize()}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return lambda request: call(request, metadata=self._metadata)

    async def snapshot_prepare(self, id: str) -> Any:
        # Nothing refers to it yet: the label keeps containerd's garbage collection off, and is cheaper than a lease.
        reply = await self._prepare(
            self._messages["snapshots"].PrepareSnapshotRequest(
                snapshotter="overlayfs", key=id, parent=self._parent, labels={"containerd.io/gc.root": "bench"}
            )
        )
        return reply.mounts

    async def container_create(self, id: str, args: list[str]) -> None:
        containers = self._messages["containers"]
        options = AnyMessage(
            type_url="containerd.runc.v1.Options",
            value=self._messages["runc"]
            .Options(binary_name=self.runtime, root=str(self.daemon.state / "oci"))
            .SerializeToString(),
        )
        container = containers.Container(
            id=id,
            runtime=containers.Container.Runtime(name="io.containerd.runc.v2", options=options),
            spec=AnyMessage(type_url=f"{_OCI}/Spec", value=json.dumps(self.spec(id, args)).encode()),
            snapshotter="overlayfs",
            snapshot_key=id,
        )
        await self._create_container(containers.CreateContainerRequest(container=container))

    async def task_create(self, id: str, mounts: Any) -> int:
        return int((await self._create(self._messages["tasks"].CreateTaskRequest(container_id=id, rootfs=mounts))).pid)

    def _process(self, id: str, exec_id: str = "") -> Any:
        return self._messages["tasks"].ProcessRequest(container_id=id, exec_id=exec_id)

    async def task_start(self, id: str) -> None:
        await self._start(self._process(id))

    async def task_wait(self, id: str) -> int:
        return int((await self._wait(self._process(id))).exit_status)

    async def task_kill(self, id: str) -> None:
        await self._kill(self._messages["tasks"].KillRequest(container_id=id, signal=signal.SIGKILL))

    async def task_delete(self, id: str) -> None:
        await self._delete(self._process(id))

    async def container_delete(self, id: str) -> None:
        await self._delete_container(self._messages["containers"].DeleteContainerRequest(id=id))

    async def snapshot_remove(self, id: str) -> None:
        await self._remove(self._messages["snapshots"].RemoveSnapshotRequest(snapshotter="overlayfs", key=id))

    async def exec_create(self, id: str, exec_id: str, args: list[str]) -> None:
        process = AnyMessage(
            type_url=f"{_OCI}/Process", value=json.dumps(self.template["process"] | {"args": args}).encode()
        )
        await self._exec(self._messages["tasks"].ExecProcessRequest(container_id=id, exec_id=exec_id, spec=process))

    async def exec_start(self, id: str, exec_id: str) -> None:
        await self._start(self._process(id, exec_id))

    async def exec_wait(self, id: str, exec_id: str) -> int:
        return int((await self._wait(self._process(id, exec_id))).exit_status)

    async def exec_delete(self, id: str, exec_id: str) -> None:
        await self._delete_process(self._process(id, exec_id))

    @asynccontextmanager
    async def exits(self) -> AsyncIterator[AsyncIterator[Exited]]:
        subscribe = self._channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            request_serializer=SubscribeRequest.SerializeToString,
            response_deserializer=Envelope.FromString,
        )
        call = subscribe(SubscribeRequest(filters=['topic=="/tasks/exit"']), metadata=self._metadata)

        async def told() -> AsyncIterator[Exited]:
            async for envelope in call:
                received = time.monotonic()
                exit = TaskExit.FromString(envelope.event.value)
                yield Exited(exit.container_id, "" if exit.id == exit.container_id else exit.id, received)

        try:
            # containerd answers nothing, not even headers, before the first event: there is only waiting a little.
            await asyncio.sleep(_SUBSCRIBE_SECONDS)
            yield told()
        finally:
            call.cancel()

    def supervisors(self) -> list[int]:
        return [pid for pid in _all_pids() if (words := _words(pid)) and _SHIM in words[0] and self._is_ours(words)]

    def _is_ours(self, words: list[str]) -> bool:
        return str(self.daemon.address) in words

    def services(self) -> list[int]:
        return [self.daemon.pid]


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _words(pid: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []
