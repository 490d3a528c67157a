"""Whole runs, in one message each."""

from __future__ import annotations

from typing import Literal

from shoal_bus.api.network import Cidr, LinkName
from shoal_bus.api.runtime.tasks import Task
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Message, Request
from shoal_bus.types import Labels, Stdio
from shoal_bus.verb import OperationVerb, behaves


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
