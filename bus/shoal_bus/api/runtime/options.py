"""What a run may have otherwise than its image says: what the OCI specification made for it is made from.

Names are Docker's and the OCI runtime-spec's (config.md, config-linux.md). An unknown field is refused here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from shoal_bus.message import Request
from shoal_bus.types import Labels

_CAPABILITY = re.compile(r"(CAP_)?[A-Z][A-Z0-9_]*")
_CPUS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_SYSTEMD_CGROUP = re.compile(r"[^/:]+\.slice:[^/:]*:[^/:]+")
_INT64 = 2**63 - 1
_UINT32 = 2**32 - 1
UNLIMITED = 2**64 - 1
"""An rlimit that is none: RLIM_INFINITY."""


def _absolute(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path")
    return value


def _below_root(value: str) -> str:
    if ".." in _absolute(value).split("/") or not value.strip("/."):
        raise ValueError("must be an absolute path below / without '..'")
    return value


def _plain(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a NUL")
    return value


def _variable(value: str) -> str:
    if "\0" in value or not value.partition("=")[0]:
        raise ValueError("must be name=value")
    return value


def _capability(value: str) -> str:
    """`CAP_` and the name, or ALL, whatever its case: Docker leaves the prefix out, ctr asks for it."""
    upper = value.upper()
    if not _CAPABILITY.fullmatch(upper):
        raise ValueError("must be a capability, as CAP_NET_ADMIN, or ALL")
    return upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"


def _cpus(value: str) -> str:
    if value and not _CPUS.fullmatch(value):
        raise ValueError("must be a list of numbers and ranges, as 0-2,4")
    return value


def _namespace(value: str) -> str:
    return value if value in ("private", "host") else _absolute(value)


def _cgroup(value: str) -> str:
    if not value or _SYSTEMD_CGROUP.fullmatch(value):
        return value
    return _below_root(value)


def _sysctl(value: Labels) -> Labels:
    if not all(re.fullmatch(r"[a-z0-9_./-]+", name) for name in value):
        raise ValueError("must name kernel parameters, as net.ipv4.ip_forward")
    return value


AbsolutePath = Annotated[str, AfterValidator(_absolute)]
OptionalPath = Annotated[str, AfterValidator(lambda value: _below_root(value) if value else value)]
PlainText = Annotated[str, AfterValidator(_plain)]
Variable = Annotated[str, AfterValidator(_variable)]
Capability = Annotated[str, AfterValidator(_capability)]
Cpus = Annotated[str, AfterValidator(_cpus)]
NamespaceMode = Annotated[str, AfterValidator(_namespace)]
"""`private`, a namespace of its own; `host`, the node's; or the path of the one to join, as /proc/4711/ns/pid."""
CgroupPath = Annotated[str, AfterValidator(_cgroup)]
Sysctls = Annotated[Labels, AfterValidator(_sysctl)]


class RunMount(Request):
    """A mount in the container (runtime-spec, config.md#mounts); it takes the place of a default with its destination.

    `source` of a bind is an absolute path of the node that is there already; without bind or rbind among its options
    it is an rbind.
    """

    destination: Annotated[str, AfterValidator(_below_root)]
    type: str = "bind"
    source: PlainText = ""
    options: list[PlainText] = []

    @model_validator(mode="after")
    def _complete(self) -> RunMount:
        if self.is_bind and not self.source.startswith("/"):
            raise ValueError("the source of a bind must be an absolute path")
        if not self.type:
            raise ValueError("a mount needs a type")
        return self

    @property
    def is_bind(self) -> bool:
        """Whether it shows a file or directory of the node, and not a file system of its own."""
        return self.type in ("bind", "rbind") or not {"bind", "rbind"}.isdisjoint(self.options)


class RunDevice(Request):
    """A device of the node, or every one below a directory; `permissions` are any of read, write and mknod."""

    path: AbsolutePath
    container_path: OptionalPath = ""
    """Empty means the same as on the node."""
    permissions: Annotated[str, Field(pattern=r"^r?w?m?$", min_length=1)] = "rwm"


class Rlimit(Request):
    """A resource limit (setrlimit(2)); `type` as RLIMIT_NOFILE, 2^64 - 1 is no limit."""

    type: Annotated[str, Field(pattern=r"^RLIMIT_[A-Z]+$")]
    soft: int = Field(ge=0, le=UNLIMITED)
    hard: int = Field(ge=0, le=UNLIMITED)

    @model_validator(mode="after")
    def _soft_below_hard(self) -> Rlimit:
        if self.soft > self.hard:
            raise ValueError(f"{self.type}: soft {self.soft} is above hard {self.hard}")
        return self


class RunResources(Request):
    """Limits of the container's cgroup; 0 means none is set. Memory in bytes, CPU times in microseconds."""

    memory: int = Field(default=0, ge=0, le=_INT64)
    memory_swap: int = Field(default=0, ge=-1, le=_INT64)
    """Memory and swap together, as OCI and Docker count; -1 is no limit."""
    memory_reservation: int = Field(default=0, ge=0, le=_INT64)
    cpu_quota: int = Field(default=0, ge=-1, le=_INT64)
    cpu_period: int = Field(default=0, ge=0, le=1_000_000)
    cpu_shares: int = Field(default=0, ge=0, le=262_144)
    cpuset_cpus: Cpus = ""
    cpuset_mems: Cpus = ""
    pids_limit: int = Field(default=0, ge=-1, le=_INT64)
    """-1 is no limit."""
    blkio_weight: int = Field(default=0, ge=0, le=1000)

    @model_validator(mode="after")
    def _possible(self) -> RunResources:
        if self.memory_swap and not self.memory:
            raise ValueError("memory_swap needs memory: it counts both")
        if 0 < self.memory_swap < self.memory:
            raise ValueError("memory_swap counts memory too: it can't be below it")
        if self.memory and self.memory_reservation > self.memory:
            raise ValueError("memory_reservation can't be above memory")
        if 0 < self.cpu_quota < 1000:
            raise ValueError("cpu_quota must be at least 1000 microseconds")
        if 0 < self.cpu_period < 1000:
            raise ValueError("cpu_period must be 1000 to 1000000 microseconds")
        if 0 < self.cpu_shares < 2:
            raise ValueError("cpu_shares must be 2 to 262144")
        if 0 < self.blkio_weight < 10:
            raise ValueError("blkio_weight must be 10 to 1000")
        return self


class Hook(Request):
    """A program of the node, run at a point of a container's life; `args` begin with its name, `timeout` is seconds."""

    path: AbsolutePath
    args: list[PlainText] = []
    env: list[Variable] = []
    timeout: int | None = Field(default=None, ge=1)


class Hooks(Request):
    """The OCI hooks (runtime-spec, config.md#posix-platform-hooks)."""

    prestart: list[Hook] = []
    create_runtime: list[Hook] = []
    create_container: list[Hook] = []
    start_container: list[Hook] = []
    poststart: list[Hook] = []
    poststop: list[Hook] = []


class IdMapping(Request):
    """`size` ids from `container_id` on are, on the node, those from `host_id` on (user_namespaces(7))."""

    container_id: int = Field(ge=0, le=_UINT32 - 1)
    host_id: int = Field(ge=0, le=_UINT32 - 1)
    size: int = Field(ge=1, le=_UINT32)


class ConsoleSize(Request):
    """A terminal's size in characters."""

    width: int = Field(ge=1, le=65535)
    height: int = Field(ge=1, le=65535)


class SpecOptions(Request):
    """What an OCI specification is made from, besides the image's configuration. Defaults are containerd's.

    A user namespace (`uid_mappings` and `gid_mappings`, both) shifts the container's ids and not those of the files in
    its rootfs: what its root is to change must belong to the id that container id 0 stands for, and the directories
    that something is mounted on must be in the image. It goes with a network namespace of its own alone, and with no
    host mode but `uts_mode`.
    """

    args: list[PlainText] = []
    """Instead of the image's command; behind its entrypoint."""
    env: list[Variable] = []
    """NAME=VALUE beside the image's; a NAME alone takes the image's away."""
    cwd: str = ""
    user: str = ""
    """`user[:group]`, each a number or a name of the image's files."""
    group_add: list[str] = []
    """Further groups of the process, by number or by a name of the image's /etc/group."""
    hostname: str = Field(default="", max_length=64)
    """Empty means the container's id."""
    domainname: str = Field(default="", max_length=64)
    cap_add: list[Capability] = []
    """Besides the default ones; ALL for every one that the node has."""
    cap_drop: list[Capability] = []
    """What `cap_add` names wins over ALL here."""
    privileged: bool = False
    """Every capability and device of the node, nothing masked or read-only, and no seccomp profile."""
    no_new_privileges: bool = True
    console_size: ConsoleSize | None = None
    """The first size of its terminal, where it has one: resizing it comes after its first look."""
    rlimits: list[Rlimit] = []
    oom_score_adj: int | None = Field(default=None, ge=-1000, le=1000)
    seccomp: Literal["default", "unconfined"] | dict[str, Any] | None = None
    """A profile as OCI's JSON has it, or Docker's. None means the default one, or none for a privileged container."""
    read_only: bool = False
    mounts: list[RunMount] = []
    devices: list[RunDevice] = []
    masked_paths: list[AbsolutePath] | None = None
    """Paths that can't be read; None means the default ones."""
    readonly_paths: list[AbsolutePath] | None = None
    """Paths that can't be written; None means the default ones."""
    rootfs_propagation: Literal["", "private", "slave", "shared", "unbindable"] = ""
    pid_mode: NamespaceMode = "private"
    ipc_mode: NamespaceMode = "private"
    uts_mode: NamespaceMode = "private"
    uid_mappings: list[IdMapping] = Field(default=[], max_length=340)
    gid_mappings: list[IdMapping] = Field(default=[], max_length=340)
    resources: RunResources = RunResources()
    cgroup: CgroupPath = ""
    """Its cgroup: a path below every hierarchy's root, or `slice:prefix:name` for systemd; else /<namespace>/<id>."""
    cgroup_parent: OptionalPath = ""
    """The cgroup that its own, named for its id, is made in."""
    sysctl: Sysctls = {}
    hooks: Hooks = Hooks()
    annotations: Labels = {}

    @model_validator(mode="after")
    def _consistent(self) -> SpecOptions:
        if self.cgroup and self.cgroup_parent:
            raise ValueError("cgroup and cgroup_parent exclude one another")
        if self.uts_mode != "private" and (self.hostname or self.domainname):
            raise ValueError("hostname and domainname go with uts_mode private alone")
        if bool(self.uid_mappings) != bool(self.gid_mappings):
            raise ValueError("uid_mappings and gid_mappings go together")
        if self.uid_mappings:
            self._check_user_namespace()
        for name, values in (
            ("mounts", (one.destination.rstrip("/") for one in self.mounts)),
            ("rlimits", (one.type for one in self.rlimits)),
        ):
            _check_unique(name, values)
        return self

    def _check_user_namespace(self) -> None:
        if self.privileged or "host" in (self.pid_mode, self.ipc_mode):
            raise ValueError("a user namespace goes neither with privileged nor with pid_mode or ipc_mode host")
        for name, maps in (("uid_mappings", self.uid_mappings), ("gid_mappings", self.gid_mappings)):
            if not any(one.container_id == 0 for one in maps):
                raise ValueError(f"{name}: container id 0 must be mapped")
            for side in ("container_id", "host_id"):
                ends = 0
                for first, size in sorted((getattr(one, side), one.size) for one in maps):
                    if first < ends or first + size > _UINT32:
                        raise ValueError(f"{name}: its ranges overlap, or end above the largest id")
                    ends = first + size


def _check_unique(name: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{name}: {value} is given twice")
        seen.add(value)
