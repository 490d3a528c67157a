"""Sandboxes: as they are stored, for clients that keep a group of containers together; and as they run.

A sandbox that runs has no process and no cgroup of its own: the containers whose specification names it (the annotation
`io.kubernetes.cri.sandbox-id`) share one shim, which comes with the first of them and goes with the last. It is ready
from its start until it is stopped, and that ends them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import AnyMessage, Filter, Labels
from shoal_bus.verb import OperationVerb, StreamVerb, Verb, behaves

SandboxState = Literal["created", "ready", "stopped"]


class SandboxRuntime(Message):
    name: str = ""
    options: AnyMessage | None = None


class Sandbox(Message):
    """A sandbox as it is stored: what it is to be, not whether it runs."""

    id: str
    runtime: SandboxRuntime = SandboxRuntime()
    spec: AnyMessage | None = None
    labels: Labels = {}
    extensions: dict[str, AnyMessage] = {}
    sandboxer: str = ""
    """Which controller runs it."""
    created_at: datetime
    updated_at: datetime


class SandboxRequest(Request):
    id: Identifier


class CreateSandbox(SandboxRequest):
    """`spec`, `options` and `extensions` are their owner's, in any encoding."""

    runtime: SandboxRuntime = SandboxRuntime()
    spec: AnyMessage | None = None
    labels: Labels = {}
    extensions: dict[str, AnyMessage] = {}
    sandboxer: str = ""


class UpdateSandbox(CreateSandbox):
    """`fields` names what to change: `labels`, `extensions`, `runtime`, `spec`, `labels.<key>`, `extensions.<key>`.

    Empty: those four, and the runtime's name must be what it was. A label or extension that is named and not given, or
    is empty, is removed.
    """

    fields: list[str] = []


class ListSandboxes(Filter, Request):
    """Filters see `id` and `labels`."""


class RunSandbox(SandboxRequest):
    """A sandbox for its controller. `netns_path` is the network namespace its containers join; theirs to name, too."""

    sandboxer: str = ""
    netns_path: str = ""
    annotations: Labels = {}


class StopSandbox(SandboxRequest):
    """Its containers get SIGTERM, and SIGKILL when that hasn't ended them within `timeout` seconds; 0: that at once."""

    timeout: float = Field(default=0, ge=0, le=86400)


class SandboxStatus(Message):
    """A sandbox as its controller has it. `exited_at` once it is stopped."""

    id: str
    sandboxer: str = ""
    state: SandboxState
    netns_path: str = ""
    annotations: Labels = {}
    created_at: datetime
    started_at: datetime | None = None
    exited_at: datetime | None = None
    exit_status: int = 0


SANDBOX_CREATE = Verb(
    "runtime",
    "sandbox",
    "create",
    CreateSandbox,
    Sandbox,
    mutates=True,
    behaviour=behaves("Stores a sandbox.", "ALREADY_EXISTS"),
)
SANDBOX_GET = Verb(
    "runtime", "sandbox", "get", SandboxRequest, Sandbox, behaviour=behaves("A stored sandbox.", "NOT_FOUND")
)
SANDBOX_LIST = StreamVerb(
    "runtime",
    "sandbox",
    "list",
    ListSandboxes,
    Sandbox,
    behaviour=behaves("Every stored sandbox of the namespace."),
)
SANDBOX_UPDATE = Verb(
    "runtime",
    "sandbox",
    "update",
    UpdateSandbox,
    Sandbox,
    mutates=True,
    behaviour=behaves("Changes a stored sandbox.", "NOT_FOUND"),
)
SANDBOX_DELETE = Verb(
    "runtime",
    "sandbox",
    "delete",
    SandboxRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a stored sandbox; what runs of it goes on.", "NOT_FOUND"),
)
SANDBOX_RUN = Verb(
    "runtime",
    "sandbox",
    "run",
    RunSandbox,
    SandboxStatus,
    mutates=True,
    behaviour=behaves("Hands a sandbox to its controller.", "ALREADY_EXISTS"),
)
SANDBOX_START = Verb(
    "runtime",
    "sandbox",
    "start",
    SandboxRequest,
    SandboxStatus,
    mutates=True,
    behaviour=behaves("Makes a sandbox ready for its containers.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
SANDBOX_STATUS = Verb(
    "runtime",
    "sandbox",
    "status",
    SandboxRequest,
    SandboxStatus,
    behaviour=behaves("How a sandbox is that its controller has.", "NOT_FOUND"),
)
SANDBOX_STOP = OperationVerb(
    "runtime",
    "sandbox",
    "stop",
    StopSandbox,
    SandboxStatus,
    Empty,
    behaviour=behaves("Ends a sandbox's containers, and with them the sandbox.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
SANDBOX_WAIT = Verb(
    "runtime",
    "sandbox",
    "wait",
    SandboxRequest,
    SandboxStatus,
    waits=True,
    behaviour=behaves("Answers when a sandbox has been stopped.", "NOT_FOUND"),
)
SANDBOX_SHUTDOWN = Verb(
    "runtime",
    "sandbox",
    "shutdown",
    SandboxRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Has the controller forget a sandbox that doesn't run.", "NOT_FOUND", "FAILED_PRECONDITION"),
)
