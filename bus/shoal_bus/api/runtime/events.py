"""The payloads of the runtime's events, and their topics: containerd's."""

from __future__ import annotations

from datetime import datetime

from shoal_bus.events import Topic
from shoal_bus.message import Message
from shoal_bus.types import AnyMessage, Labels, Mount


class ContainerRuntime(Message):
    name: str
    options: AnyMessage | None = None


class ContainerCreated(Message):
    """Payload of `/containers/create`."""

    id: str
    image: str = ""
    runtime: ContainerRuntime


class ContainerUpdated(Message):
    id: str
    image: str = ""
    labels: Labels = {}
    snapshot_key: str = ""


class ContainerDeleted(Message):
    id: str


class TaskIO(Message):
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class TaskCreated(Message):
    container_id: str
    bundle: str
    rootfs: list[Mount] = []
    io: TaskIO = TaskIO()
    checkpoint: str = ""
    pid: int


class TaskStarted(Message):
    container_id: str
    pid: int


class TaskExited(Message):
    """Payload of `/tasks/exit`; `id` is the exec's id, or the container's for its first process."""

    container_id: str
    id: str
    pid: int
    exit_status: int
    exited_at: datetime


class TaskDeleted(Message):
    container_id: str
    id: str = ""
    pid: int
    exit_status: int
    exited_at: datetime


class TaskExecAdded(Message):
    container_id: str
    exec_id: str


class TaskExecStarted(Message):
    container_id: str
    exec_id: str
    pid: int


class TaskPaused(Message):
    container_id: str


class TaskResumed(Message):
    container_id: str


class TaskOOM(Message):
    """Payload of `/tasks/oom`: the kernel has killed a process of the container for want of memory within its limit."""

    container_id: str


class TaskCheckpointed(Message):
    container_id: str
    checkpoint: str


class SandboxCreated(Message):
    sandbox_id: str


class SandboxStarted(Message):
    sandbox_id: str


class SandboxExited(Message):
    sandbox_id: str
    exit_status: int
    exited_at: datetime


CONTAINERS_CREATE = Topic("runtime", "/containers/create", ContainerCreated, "id")
CONTAINERS_UPDATE = Topic("runtime", "/containers/update", ContainerUpdated, "id")
CONTAINERS_DELETE = Topic("runtime", "/containers/delete", ContainerDeleted, "id")
TASKS_CREATE = Topic("runtime", "/tasks/create", TaskCreated, "container_id")
TASKS_START = Topic("runtime", "/tasks/start", TaskStarted, "container_id")
TASKS_EXIT = Topic("runtime", "/tasks/exit", TaskExited, "container_id")
TASKS_DELETE = Topic("runtime", "/tasks/delete", TaskDeleted, "container_id")
TASKS_EXEC_ADDED = Topic("runtime", "/tasks/exec-added", TaskExecAdded, "container_id")
TASKS_EXEC_STARTED = Topic("runtime", "/tasks/exec-started", TaskExecStarted, "container_id")
TASKS_PAUSED = Topic("runtime", "/tasks/paused", TaskPaused, "container_id")
TASKS_RESUMED = Topic("runtime", "/tasks/resumed", TaskResumed, "container_id")
TASKS_OOM = Topic("runtime", "/tasks/oom", TaskOOM, "container_id")
TASKS_CHECKPOINTED = Topic("runtime", "/tasks/checkpointed", TaskCheckpointed, "container_id")
SANDBOXES_CREATE = Topic("runtime", "/sandboxes/create", SandboxCreated, "sandbox_id")
SANDBOXES_START = Topic("runtime", "/sandboxes/start", SandboxStarted, "sandbox_id")
SANDBOXES_EXIT = Topic("runtime", "/sandboxes/exit", SandboxExited, "sandbox_id")
