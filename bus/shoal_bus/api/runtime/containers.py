"""Container records: what would run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field, model_validator

from shoal_bus.api.runtime.tasks import RuncOptions, Task
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import AnyMessage, Filter, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves

SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
"""The type of an OCI runtime specification that is packed, as JSON, into an `AnyMessage` (containerd, typeurl)."""
RUNC_V2 = "io.containerd.runc.v2"
"""Containerd's name for runc under a shim, and for what shoal's own clients call by its binary's name."""
OPTIONS_TYPE = "containerd.runc.v1.Options"
"""That of packed `RuncOptions`, as protobuf."""


class Container(Message):
    """A container record: what would run, not whether it does (that is its task)."""

    id: str
    image: str = ""
    labels: Labels = {}
    runtime: str = "runc"
    """An OCI runtime by name on PATH or by absolute path, or by containerd's name for it: `io.containerd.runc.v2`."""
    options: RuncOptions = RuncOptions()
    packed_options: AnyMessage | None = None
    """The options as a client packed them, if one did."""
    snapshotter: str = ""
    snapshot_key: str = ""
    network: str = ""
    """The network namespace made for it, if one was."""
    sandbox: str = ""
    """The sandbox it belongs to, for who asks: nothing is done with it."""
    spec: dict[str, Any] = {}
    """The OCI runtime specification, as its JSON has it."""
    packed_spec: AnyMessage | None = None
    """The same, byte for byte as a client packed it; where that was asked for (`packed`), and instead of `spec`."""
    extensions: dict[str, AnyMessage] = {}
    """What clients keep beside it."""
    created_at: datetime
    updated_at: datetime


class ContainerRequest(Request):
    id: Identifier


class GetContainer(ContainerRequest):
    """`packed` has the specification told in `packed_spec`."""

    packed: bool = False


class ListContainers(Filter, Request):
    """`specs` false leaves the specifications out, which are the bulk of it; `packed` has them in `packed_spec`."""

    specs: bool = True
    packed: bool = False


class CreateContainer(Request):
    """A record. `spec` is the whole OCI specification; `shoal run` has one generated, by `TASK_RUN`.

    With `packed_spec` instead, its bytes are kept as they are, and looked at when a task is made of them; the reply has
    neither. `options` is what can be made of `packed_options`.
    """

    id: Identifier
    image: str = ""
    labels: Labels = {}
    runtime: str = "runc"
    options: RuncOptions = RuncOptions()
    packed_options: AnyMessage | None = None
    snapshotter: str = ""
    snapshot_key: str = ""
    sandbox: str = ""
    spec: dict[str, Any] | None = None
    packed_spec: AnyMessage | None = None
    extensions: dict[str, AnyMessage] = {}

    @model_validator(mode="after")
    def _one_spec(self) -> CreateContainer:
        if (self.spec is None) == (self.packed_spec is None):
            raise ValueError("either spec or packed_spec must be given")
        return self


class UpdateContainer(Request):
    """`fields` names what to change: `labels`, `labels.<key>`, `image`, `spec`, `snapshot_key`, `extensions`,
    `extensions.<key>`; empty: all given. `spec` may be given as `packed_spec`.

    `runtime` and `snapshotter` can't be changed: where they are given, they must be what they are. `packed` has the
    reply tell the specification in `packed_spec`.
    """

    id: Identifier
    image: str = ""
    labels: Labels = {}
    runtime: str | None = None
    snapshotter: str | None = None
    snapshot_key: str = ""
    spec: dict[str, Any] | None = None
    packed_spec: AnyMessage | None = None
    extensions: dict[str, AnyMessage] = {}
    packed: bool = False
    fields: list[str] = []


class RemoveContainer(Request):
    """The container with everything made for it by a run: task, snapshot, network. `force` kills what still runs."""

    id: Identifier
    force: bool = False


class RestartContainer(Request):
    """`after` is the request id of the restart before it, empty for the first: ABORTED if there was another since."""

    id: Identifier
    after: str = ""


class HoldRestarts(Request):
    """For so many seconds no restart policy starts anything: what stops all containers of a node asks for that."""

    seconds: float = Field(ge=0, le=3600)


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
    "runtime", "container", "get", GetContainer, Container, behaviour=behaves("A container record.", "NOT_FOUND")
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
CONTAINER_START = Verb(
    "runtime",
    "container",
    "start",
    ContainerRequest,
    Task,
    mutates=True,
    behaviour=behaves(
        "Starts a container that doesn't run: a new task on its snapshot, which writes to where a restarted one does.",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
    ),
)
CONTAINER_RESTART = Verb(
    "runtime",
    "container",
    "restart",
    RestartContainer,
    Task,
    mutates=True,
    behaviour=behaves(
        "Starts a container that has ended, as its restart policy wants it, and counts that: what the service asks of"
        " itself.",
        "ABORTED",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
    ),
)
NODE_HOLD_RESTARTS = Verb(
    "runtime",
    "node",
    "hold_restarts",
    HoldRestarts,
    Empty,
    mutates=True,
    behaviour=behaves("Has restart policies wait.", whole_node=True),
)
