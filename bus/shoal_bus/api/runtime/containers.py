"""Container records: what would run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from shoal_bus.api.runtime.tasks import RuncOptions, Task
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves


class Container(Message):
    """A container record: what would run, not whether it does (that is its task)."""

    id: str
    image: str = ""
    labels: Labels = {}
    runtime: str = "runc"
    """An OCI runtime by name on PATH or by absolute path."""
    options: RuncOptions = RuncOptions()
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
    options: RuncOptions = RuncOptions()
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
