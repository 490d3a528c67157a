"""Whole runs, in one message each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from shoal_bus.api.network import Cidr, LinkName
from shoal_bus.api.runtime.options import SpecOptions
from shoal_bus.api.runtime.tasks import Task
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Message
from shoal_bus.restart import RestartPolicy
from shoal_bus.types import Labels, Stdio
from shoal_bus.verb import OperationVerb, behaves


class RunNetwork(Message):
    """`none`: a network namespace with loopback alone; `host`: the node's own; `bridge`: a veth pair into `bridge`."""

    mode: Literal["none", "host", "bridge"] = "none"
    address: Cidr | None = None
    gateway: str = ""
    bridge: LinkName = "shoal0"


class RunTask(SpecOptions):
    """A whole run in one message: snapshot, network, container, task, start. A step that fails undoes what was begun.

    The image must be there and unpacked. Its OCI specification is made from the image's configuration and the options
    here; or `spec` is the whole of it, taken as it is, with none of those options beside it: its `root.path` is
    `rootfs`, its `process.terminal` is that of `stdio`, and the namespaces it joins, networks too, are the caller's.
    """

    id: Identifier
    image: str
    spec: dict[str, Any] | None = None
    labels: Labels = {}
    runtime: str = ""
    """Empty means the node's default."""
    snapshotter: str = "overlayfs"
    network: RunNetwork = RunNetwork()
    stdio: Stdio = Stdio()
    remove: bool = False
    """When it exits, remove the container and everything that was made for it."""
    restart: RestartPolicy = "no"
    """When it is started again: `no`, `always`, `unless-stopped` or `on-failure[:N]`; kept in containerd's labels."""

    @model_validator(mode="after")
    def _possible(self) -> RunTask:
        if self.remove and self.restart != "no":
            raise ValueError(f"what is removed at its exit can't be started again: remove, or restart {self.restart}")
        if self.uid_mappings and self.network.mode != "none":
            raise ValueError(f"a user namespace goes with network none, not with {self.network.mode}")
        if self.spec is not None:
            given = [name for name, field in SpecOptions.model_fields.items() if getattr(self, name) != field.default]
            if self.network.mode != "none":
                given.append("network")
            if given:
                raise ValueError(f"spec is taken whole: {', '.join(given)} can't go with it")
        return self


class RunProgress(Message):
    step: str = ""


TASK_RUN = OperationVerb(
    "runtime",
    "task",
    "run",
    RunTask,
    Task,
    RunProgress,
    quiet_seconds=0.25,
    behaviour=behaves(
        "Makes and starts a container from an image, in one message.",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    ),
)
