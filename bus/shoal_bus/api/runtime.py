"""`services/runtime`: containers, tasks, and whole runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from shoal_bus.api.network import Cidr, LinkName
from shoal_bus.events import Topic
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels, Mount, Stdio
from shoal_bus.verb import OperationVerb, StreamVerb, Verb, behaves

# ----------------------------------------------------------------------------------------------------------- containers


class Container(Message):
    """A container record: what would run, not whether it does (that is its task)."""

    id: str
    image: str = ""
    labels: Labels = {}
    runtime: str = "runc"
    """An OCI runtime by name on PATH or by absolute path."""
    snapshotter: str = ""
    snapshot_key: str = ""
    network: str = ""
    """The network namespace made for it, if one was."""
    spec: dict[str, Any] = {}
    """The OCI runtime specification, as its JSON has it."""
    created_at: datetime
    updated_at: datetime


class ContainerRequest(Request):
    id: Identifier


class ListContainers(Filter, Request):
    """`specs` false leaves the specifications out, which are the bulk of it."""

    specs: bool = True


class CreateContainer(Request):
    """A record. `spec` is the whole OCI specification; `shoal run` has one generated, by `TASK_RUN`."""

    id: Identifier
    image: str = ""
    labels: Labels = {}
    runtime: str = "runc"
    snapshotter: str = ""
    snapshot_key: str = ""
    spec: dict[str, Any]


class UpdateContainer(Request):
    """`fields` names what to change: `labels`, `labels.<key>`, `image`, `spec`, `snapshot_key`; empty: all given."""

    id: Identifier
    image: str = ""
    labels: Labels = {}
    snapshot_key: str = ""
    spec: dict[str, Any] | None = None
    fields: list[str] = []


class RemoveContainer(Request):
    """The container with everything made for it by a run: task, snapshot, network. `force` kills what still runs."""

    id: Identifier
    force: bool = False


CONTAINER_CREATE = Verb(
    "runtime",
    "container",
    "create",
    CreateContainer,
    Container,
    mutates=True,
    behaviour=behaves("Makes a container record.", "ALREADY_EXISTS"),
)
CONTAINER_GET = Verb(
    "runtime", "container", "get", ContainerRequest, Container, behaviour=behaves("A container record.", "NOT_FOUND")
)
CONTAINER_LIST = StreamVerb(
    "runtime",
    "container",
    "list",
    ListContainers,
    Container,
    behaviour=behaves("Every container record of the namespace."),
)
CONTAINER_UPDATE = Verb(
    "runtime",
    "container",
    "update",
    UpdateContainer,
    Container,
    mutates=True,
    behaviour=behaves("Changes a container record.", "NOT_FOUND"),
)
CONTAINER_DELETE = Verb(
    "runtime",
    "container",
    "delete",
    ContainerRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a container record that has no task.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
CONTAINER_REMOVE = Verb(
    "runtime",
    "container",
    "remove",
    RemoveContainer,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a container and everything a run made for it.", "NOT_FOUND", "FAILED_PRECONDITION"),
)

# ---------------------------------------------------------------------------------------------------------------- tasks

Status = Literal["creating", "created", "running", "paused", "stopped"]


class Task(Message):
    """A container's process: `exit_status` and `exited_at` once `status` is stopped."""

    container_id: str
    pid: int = 0
    status: Status
    bundle: str = ""
    stdio: Stdio = Stdio()
    exit_status: int = 0
    exited_at: datetime | None = None


class TaskRequest(Request):
    container_id: Identifier


class CreateTask(Request):
    """A task, created and not started. `rootfs` is what its snapshot's `Mount` list says."""

    container_id: Identifier
    rootfs: list[Mount] = []
    stdio: Stdio = Stdio()


class KillTask(Request):
    """`signal` as a number; `all` signals every process of the container."""

    container_id: Identifier
    signal: int = Field(default=15, ge=1, le=64)
    all: bool = False


class Exit(Message):
    """How it ended: 128 + the signal's number where a signal ended it."""

    container_id: str
    pid: int
    exit_status: int
    exited_at: datetime


class ListTasks(Filter, Request):
    pass


class ResizeTask(Request):
    container_id: Identifier
    width: int = Field(ge=0, le=65535)
    height: int = Field(ge=0, le=65535)


TASK_CREATE = Verb(
    "runtime",
    "task",
    "create",
    CreateTask,
    Task,
    mutates=True,
    behaviour=behaves(
        "Creates a container's task: bundle, rootfs, shim, OCI create.",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
    ),
)
TASK_START = Verb(
    "runtime",
    "task",
    "start",
    TaskRequest,
    Task,
    mutates=True,
    behaviour=behaves("Starts a created task.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
TASK_KILL = Verb(
    "runtime",
    "task",
    "kill",
    KillTask,
    Empty,
    mutates=True,
    behaviour=behaves("Sends a signal.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
TASK_WAIT = Verb(
    "runtime",
    "task",
    "wait",
    TaskRequest,
    Exit,
    waits=True,
    behaviour=behaves("Answers when the task has exited.", "NOT_FOUND"),
)
TASK_DELETE = Verb(
    "runtime",
    "task",
    "delete",
    TaskRequest,
    Exit,
    mutates=True,
    behaviour=behaves(
        "Removes a stopped task, with what it held, and says how it ended.", "NOT_FOUND", "FAILED_PRECONDITION"
    ),
)
TASK_GET = Verb("runtime", "task", "get", TaskRequest, Task, behaviour=behaves("A task's state.", "NOT_FOUND"))
TASK_LIST = StreamVerb("runtime", "task", "list", ListTasks, Task, behaviour=behaves("Every task of the namespace."))
TASK_RESIZE = Verb(
    "runtime",
    "task",
    "resize",
    ResizeTask,
    Empty,
    behaviour=behaves("Sets the size of a task's terminal.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
TASK_CLOSE_IO = Verb(
    "runtime",
    "task",
    "close_io",
    TaskRequest,
    Empty,
    behaviour=behaves("Ends a task's standard input: it reads what has been written, and then its end.", "NOT_FOUND"),
)

# ----------------------------------------------------------------------------------------------------------------- runs


class RunNetwork(Message):
    """`none`: a network namespace with loopback alone; `host`: the node's own; `bridge`: a veth pair into `bridge`."""

    mode: Literal["none", "host", "bridge"] = "none"
    address: Cidr | None = None
    gateway: str = ""
    bridge: LinkName = "shoal0"


class RunTask(Request):
    """A whole run in one message: snapshot, network, container, task, start. A step that fails undoes what was begun.

    The image must be there and unpacked. `args` replaces the image's command, `env` adds to its environment.
    """

    id: Identifier
    image: str
    args: list[str] = []
    env: list[str] = []
    cwd: str = ""
    user: str = ""
    hostname: str = ""
    labels: Labels = {}
    runtime: str = ""
    """Empty means the node's default."""
    snapshotter: str = "overlayfs"
    network: RunNetwork = RunNetwork()
    stdio: Stdio = Stdio()
    read_only: bool = False
    remove: bool = False
    """When it exits, remove the container and everything that was made for it."""


class RunProgress(Message):
    step: str = ""


TASK_RUN = OperationVerb(
    "runtime",
    "task",
    "run",
    RunTask,
    Task,
    RunProgress,
    behaviour=behaves(
        "Makes and starts a container from an image, in one message.",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    ),
)

# --------------------------------------------------------------------------------------------------------------- events


class ContainerRuntime(Message):
    name: str


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


CONTAINERS_CREATE = Topic("runtime", "/containers/create", ContainerCreated, "id")
CONTAINERS_UPDATE = Topic("runtime", "/containers/update", ContainerUpdated, "id")
CONTAINERS_DELETE = Topic("runtime", "/containers/delete", ContainerDeleted, "id")
TASKS_CREATE = Topic("runtime", "/tasks/create", TaskCreated, "container_id")
TASKS_START = Topic("runtime", "/tasks/start", TaskStarted, "container_id")
TASKS_EXIT = Topic("runtime", "/tasks/exit", TaskExited, "container_id")
TASKS_DELETE = Topic("runtime", "/tasks/delete", TaskDeleted, "container_id")
