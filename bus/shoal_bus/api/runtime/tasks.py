"""Tasks: a container's processes, the first one and the execs beside it.

A process is named by its container's id and, for an exec, by an `exec_id`; an empty one means the first process.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from shoal_bus.api.runtime.options import Capability, ConsoleSize
from shoal_bus.identifiers import Identifier, check_identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Descriptor, Digest, Filter, Mount, Stdio
from shoal_bus.verb import StreamVerb, Verb, behaves

Status = Literal["creating", "created", "running", "paused", "stopped"]

ExecId = Annotated[str, AfterValidator(lambda value: check_identifier(value, "exec id") if value else value)]
"""The id of an exec, or empty for the container's first process."""


class Task(Message):
    """A process of a container: `exit_status` and `exited_at` once `status` is stopped."""

    container_id: str
    exec_id: str = ""
    pid: int = 0
    status: Status
    bundle: str = ""
    stdio: Stdio = Stdio()
    exit_status: int = 0
    exited_at: datetime | None = None


class TaskRequest(Request):
    """A container's task as a whole."""

    container_id: Identifier


class ProcessRequest(TaskRequest):
    """One process of a container."""

    exec_id: ExecId = ""


class RuncOptions(Message):
    """What a task's shim passes on to the OCI runtime: containerd's runc options, with their names."""

    binary_name: str = ""
    """The runtime's program, by name on PATH or by absolute path, where it isn't the container's `runtime`."""
    root: str = ""
    """Where the runtime keeps its state, as a parent of a directory for each namespace."""
    systemd_cgroup: bool = False
    no_pivot_root: bool = False
    no_new_keyring: bool = False
    io_uid: int = Field(default=0, ge=0, le=0xFFFFFFFE)
    io_gid: int = Field(default=0, ge=0, le=0xFFFFFFFE)
    """Who owns what a process without given streams is handed, and the terminal."""
    shim_cgroup: str = ""
    """The cgroup the shim itself is moved to, as a path below every hierarchy's root."""
    criu_image_path: str = ""
    criu_work_path: str = ""


class CreateTask(TaskRequest):
    """A task, created and not started. `rootfs` is what its snapshot's `Mount` list says.

    `checkpoint` is the directory of a checkpoint to restore instead, or `checkpoint_blob` an archive of one in the
    content store; `options` and `runtime` win over the container's own.
    """

    rootfs: list[Mount] = []
    stdio: Stdio = Stdio()
    runtime: str = ""
    options: RuncOptions | None = None
    checkpoint: str = ""
    checkpoint_blob: Digest | None = None


class ExecTask(TaskRequest):
    """A further process in a running container.

    `process` is the whole OCI process (runtime-spec, config.md#process). Without it, the container's own is taken, with
    `args` and whatever else is given here. `start` starts it in the same message.
    """

    exec_id: Identifier
    process: dict[str, Any] | None = None
    args: list[str] = []
    env: list[str] = []
    cwd: str = ""
    user: str = ""
    """`user[:group]` by number, or by a name in the container's own files."""
    capabilities: list[Capability] = []
    """Capabilities it has besides those of the container's first process, as `CAP_NET_ADMIN`; ALL for every one."""
    console_size: ConsoleSize | None = None
    """The first size of its terminal, where it has one."""
    stdio: Stdio = Stdio()
    start: bool = False
    remove: bool = False
    """When it exits, remove it: nobody will ask how it ended."""


class KillTask(ProcessRequest):
    """`signal` as a number; `all` signals every process of the container."""

    signal: int = Field(default=15, ge=1, le=64)
    all: bool = False


class WaitTask(ProcessRequest):
    """`pid` says which process is meant where its container may have been started again since; 0: whichever is there.

    NOT_FOUND when it isn't that one any more: its `/tasks/exit` says how it ended.
    """

    pid: int = Field(default=0, ge=0)


class DeleteTask(ProcessRequest):
    """`force` kills what still runs, and answers with how it ended."""

    force: bool = False


class Exit(Message):
    """How it ended: 128 + the signal's number where a signal ended it."""

    container_id: str
    exec_id: str = ""
    pid: int
    exit_status: int
    exited_at: datetime


class ListTasks(Filter, Request):
    pass


class ResizeTask(ProcessRequest):
    width: int = Field(ge=0, le=65535)
    height: int = Field(ge=0, le=65535)


class UpdateTask(TaskRequest):
    """New limits: `resources` are OCI's (runtime-spec, config-linux.md#control-groups), as `{"memory": {"limit": …}}`.

    They replace those fields in the container's specification, too, so that a next task has them, unless `once`.
    """

    resources: dict[str, Any]
    once: bool = False


class CheckpointTask(TaskRequest):
    """`path` is the directory the checkpoint is written to: CRIU's image files; empty is the content store.

    `exit` ends the container then. CRIU's logs are left in `work_path`, where one is given.
    """

    path: str = ""
    work_path: str = ""
    exit: bool = False
    open_tcp: bool = False
    external_unix_sockets: bool = False
    terminal: bool = False
    file_locks: bool = False
    empty_namespaces: list[str] = []


class Checkpoint(Message):
    """A checkpoint in the content store: an archive of its image files, and the specification; else nothing."""

    descriptors: list[Descriptor] = []


class ProcessInfo(Message):
    pid: int
    exec_id: str = ""
    """Which exec it is, if it is one's first process."""


class Pids(Message):
    """The processes of a container, as the node numbers them."""

    processes: list[ProcessInfo] = []


_GONE = ("NOT_FOUND", "FAILED_PRECONDITION")
_RUNTIME = (*_GONE, "ABORTED")
"""Of verbs that have the OCI runtime do something: ABORTED when that was killed; asked again, it may do it."""

TASK_CREATE = Verb(
    "runtime",
    "task",
    "create",
    CreateTask,
    Task,
    mutates=True,
    behaviour=behaves(
        "Creates a container's task: bundle, rootfs, shim, OCI create.",
        "ALREADY_EXISTS",
        *_RUNTIME,
    ),
)
TASK_EXEC = Verb(
    "runtime",
    "task",
    "exec",
    ExecTask,
    Task,
    mutates=True,
    behaviour=behaves("Adds a process to a running task.", "ALREADY_EXISTS", *_RUNTIME),
)
TASK_START = Verb(
    "runtime",
    "task",
    "start",
    ProcessRequest,
    Task,
    mutates=True,
    behaviour=behaves("Starts a created task, or an exec that was added.", *_RUNTIME),
)
TASK_KILL = Verb(
    "runtime", "task", "kill", KillTask, Empty, mutates=True, behaviour=behaves("Sends a signal.", *_RUNTIME)
)
TASK_PAUSE = Verb(
    "runtime",
    "task",
    "pause",
    TaskRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Freezes a running task.", *_RUNTIME),
)
TASK_RESUME = Verb(
    "runtime", "task", "resume", TaskRequest, Empty, mutates=True, behaviour=behaves("Thaws a paused task.", *_RUNTIME)
)
TASK_UPDATE = Verb(
    "runtime",
    "task",
    "update",
    UpdateTask,
    Empty,
    mutates=True,
    behaviour=behaves("Changes the limits of a task that isn't stopped.", *_RUNTIME),
)
TASK_CHECKPOINT = Verb(
    "runtime",
    "task",
    "checkpoint",
    CheckpointTask,
    Checkpoint,
    mutates=True,
    behaviour=behaves(
        "Writes a running task to a directory or the content store, with CRIU, so that it can be restored.", *_RUNTIME
    ),
)
TASK_WAIT = Verb(
    "runtime",
    "task",
    "wait",
    WaitTask,
    Exit,
    waits=True,
    behaviour=behaves("Answers when the process has exited.", "NOT_FOUND"),
)
TASK_DELETE = Verb(
    "runtime",
    "task",
    "delete",
    DeleteTask,
    Exit,
    mutates=True,
    behaviour=behaves("Removes a stopped process, with what it held, and says how it ended.", *_RUNTIME),
)
TASK_GET = Verb(
    "runtime", "task", "get", ProcessRequest, Task, behaviour=behaves("A task's state, or an exec's.", "NOT_FOUND")
)
TASK_LIST = StreamVerb("runtime", "task", "list", ListTasks, Task, behaviour=behaves("Every task of the namespace."))
TASK_PIDS = Verb(
    "runtime",
    "task",
    "pids",
    TaskRequest,
    Pids,
    behaviour=behaves("The processes of a task that isn't stopped.", *_GONE),
)
TASK_RESIZE = Verb(
    "runtime",
    "task",
    "resize",
    ResizeTask,
    Empty,
    behaviour=behaves("Sets the size of a process's terminal.", *_GONE),
)
TASK_CLOSE_IO = Verb(
    "runtime",
    "task",
    "close_io",
    ProcessRequest,
    Empty,
    behaviour=behaves(
        "Ends a process's standard input: it reads what has been written, and then its end.", "NOT_FOUND"
    ),
)
