"""Containerd's configuration file, versions 2 to 4, as far as it concerns a node of shoal's; the rest is named.

The file's format: https://github.com/containerd/containerd/blob/main/docs/man/containerd-config.toml.5.md
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shoal_bus.errors import InvalidArgument, NotFound, PermissionDenied

from shoal_cli.containerd.durations import seconds_of
from shoal_cli.containerd.tables import Table

DEFAULT_FILE = Path("/etc/containerd/config.toml")
LEVELS = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning", "error": "error",
          "fatal": "error", "panic": "error"}  # fmt: skip
"""Containerd's log levels, and those of a node."""

NEWEST = 4
"""The newest version of the file's format, which is what is printed."""
_HOST_WIDE = ("temp", "plugin_dir", "required_plugins", "proxy_plugins", "timeouts", "temp_dir")
"""Keys of the file that containerd knows, and that have nothing to apply to here."""
_ELSEWHERE = {
    "debug": ("address", "uid", "gid", "format"),
    "metrics": ("address", "grpc_histogram"),
    "grpc": ("tcp_address", "tcp_tls_ca", "tcp_tls_cert", "tcp_tls_key", "tcp_tls_common_name"),
}
"""What containerd's other sockets are told: a node has HTTP for metrics and logs for the rest."""
GRPC, TTRPC = "io.containerd.server.v1.grpc", "io.containerd.server.v1.ttrpc"
CRI, CRI_IMAGES, CRI_RUNTIME = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
)
RESTART = "io.containerd.monitor.container.v1.restart"
_RESTART_NAMES = ("io.containerd.internal.v1.restart", RESTART)
"""The restart monitor, in version 2 and since version 3."""
_MOST_OOM_SCORE = 1000
_SHIM = re.compile(r"io\.containerd\.([a-z0-9_-]+)\.v\d+")
_TRANSFER = "io.containerd.transfer.v1.local"


@dataclass(frozen=True)
class StreamProcessor:
    """A program that layers of some media types go through."""

    accepts: list[str]
    returns: str
    path: str
    args: list[str]
    env: list[str]


@dataclass
class Configuration:
    """What a node is told; what a file doesn't say is containerd's default."""

    root: Path = Path("/var/lib/containerd")
    state: Path = Path("/run/containerd")
    address: Path = Path("/run/containerd/containerd.sock")
    uid: int = 0
    gid: int = 0
    """Who owns the sockets besides root: their mode is 0660."""
    ttrpc: Path | None = None
    """The socket for ttrpc; None: beside the other, with `.ttrpc` behind its name."""
    level: str = "info"
    runtime: str = "runc"
    snapshotter: str = ""
    """Where images are unpacked whose client doesn't say; empty: where the node does."""
    registry_config: Path | None = None
    oom_score: int = 0
    """The OOM score adjustment of the node's processes; 0: as it is."""
    cgroup: str = ""
    """Where the node's processes are, in every hierarchy; empty: where they are started."""
    restart_interval: float = 10.0
    """Seconds between looks at containers' restart policies."""
    restarts: bool = True
    """Whether the node heeds them."""
    stream_processors: dict[str, StreamProcessor] = field(default_factory=dict)
    """By their names; where the file has none, the node's own file tells."""
    imports: list[str] = field(default_factory=list)
    """What the file imports, where that isn't read."""
    warnings: list[str] = field(default_factory=list)
    """What of the file doesn't apply, a sentence each."""


def load(path: Path, *, asked_for: bool, alone: bool = False) -> Configuration:
    """The file's configuration, with those it imports, or `alone`.

    One that isn't there is an error where it was asked for.

    NOT_FOUND, PERMISSION_DENIED, or INVALID_ARGUMENT, which names the file and the key.
    """
    configuration = Configuration()
    if not path.exists() and not asked_for:
        return configuration
    if alone:
        values, configuration.imports = _values(path)
        files = [(path, values)]
    else:
        files = _files(path, set())
    for file, values in files:
        try:
            _read(configuration, Table(values))
        except InvalidArgument as error:
            raise InvalidArgument(f"{file}: {error.message}", hint=error.hint) from None
    return configuration


def _values(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a file says, and apart from that what it imports."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file") from None
    except PermissionError:
        raise PermissionDenied(f"{path}: can't be read", hint="run as root") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InvalidArgument(f"{path}: not TOML: {error}") from None
    imports = values.pop("imports", [])
    if not isinstance(imports, list) or not all(isinstance(one, str) for one in imports):
        raise InvalidArgument(f"{path}: imports: must be an array of paths")
    return values, imports


def _files(path: Path, seen: set[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """A file, and behind it those that it imports, each once; what comes later wins."""
    if path.resolve() in seen:
        return []
    seen.add(path.resolve())
    values, imports = _values(path)
    found = [(path, values)]
    for pattern in imports:
        place = Path(pattern) if Path(pattern).is_absolute() else path.parent / pattern
        matching = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
        for one in matching:
            found += _files(one, seen)
    return found


def _read(into: Configuration, file: Table) -> None:
    version = file.integer("version")
    if version > NEWEST:
        raise InvalidArgument(f"version: {version} is not known, the newest is {NEWEST}")
    into.root = _path(file, "root") or into.root
    into.state = _path(file, "state") or into.state
    grpc = file.table("grpc")
    _grpc(into, grpc)
    _ttrpc(into, file.table("ttrpc"))
    debug = file.table("debug")
    level = debug.text("level")
    if level:
        if level not in LEVELS:
            raise InvalidArgument(f"debug.level: {level!r} must be one of {', '.join(LEVELS)}")
        into.level = LEVELS[level]
    tables = {"grpc": grpc, "debug": debug, "metrics": file.table("metrics")}
    for name, table in tables.items():
        for key in _ELSEWHERE[name]:
            if table.set(key):
                into.warnings.append(f"{table.name(key)}: doesn't apply, there is no such socket here")
        _unknown(into, table)
    _process(into, file)
    _processors(into, file.table("stream_processors"))
    for key in _HOST_WIDE:
        if file.set(key):
            into.warnings.append(f"{key}: doesn't apply here")
    plugins = file.table("plugins")
    if version < 2 and plugins.left():
        into.warnings.append(f"plugins: not read, since the file's version is {version or 1}")
    else:
        _read_plugins(into, plugins)
    _unknown(into, file)


def _process(into: Configuration, file: Table) -> None:
    """What the file says of the daemon's own processes."""
    into.oom_score = file.integer("oom_score") or into.oom_score
    if not -_MOST_OOM_SCORE <= into.oom_score <= _MOST_OOM_SCORE:
        raise InvalidArgument(f"oom_score: {into.oom_score} must be from -{_MOST_OOM_SCORE} to {_MOST_OOM_SCORE}")
    cgroup = file.table("cgroup")
    into.cgroup = cgroup.text("path").strip("/") or into.cgroup
    if ".." in into.cgroup.split("/"):
        raise InvalidArgument(f"{cgroup.name('path')}: {into.cgroup!r} must be a plain path")
    _unknown(into, cgroup)
    for one in file.texts("disabled_plugins"):
        if one in _RESTART_NAMES:
            into.restarts = False
        else:
            into.warnings.append(f"disabled_plugins: {one} doesn't apply here")


def _processors(into: Configuration, table: Table) -> None:
    for name, one in table.tables():
        into.stream_processors[name] = StreamProcessor(
            accepts=one.texts("accepts"), returns=one.text("returns"), path=one.text("path"), args=one.texts("args"),
            env=one.texts("env"),
        )  # fmt: skip
        for key in ("accepts", "returns", "path"):
            if not getattr(into.stream_processors[name], key):
                raise InvalidArgument(f"{one.name(key)}: must be given")
        _unknown(into, one)


def _restart(into: Configuration, table: Table) -> None:
    if text := table.text("interval"):
        into.restart_interval = seconds_of(text, table.name("interval"))
    _unknown(into, table)


def _read_plugins(into: Configuration, plugins: Table) -> None:
    for name, table in plugins.tables():
        if name in _READ:
            _READ[name](into, table)
            if table.left():
                into.warnings.append(f"{table.path}: of its keys {', '.join(sorted(table.left()))} don't apply here")
        elif table.left():
            into.warnings.append(f"{table.path}: doesn't apply here")


def _cri(into: Configuration, table: Table) -> None:
    containers = table.table("containerd")
    _registry(into, table)
    into.snapshotter = containers.text("snapshotter") or into.snapshotter
    _runtime(into, containers)


def _grpc(into: Configuration, table: Table) -> None:
    into.address = _path(table, "address") or into.address
    into.uid, into.gid = _owner(table, "uid", into.uid), _owner(table, "gid", into.gid)
    table.set("max_recv_message_size"), table.set("max_send_message_size")  # 16 MiB and any, as containerd's defaults


def _ttrpc(into: Configuration, table: Table) -> None:
    into.ttrpc = _path(table, "address") or into.ttrpc
    table.set("max_recv_message_size"), table.set("max_send_message_size")  # 4 MiB, the protocol's own bound
    for key, same in (("uid", into.uid), ("gid", into.gid)):
        if table.integer(key) not in (0, same):
            into.warnings.append(f"{table.name(key)}: doesn't apply, the socket has grpc.{key}")
    _unknown(into, table)


def _cri_images(into: Configuration, table: Table) -> None:
    _registry(into, table)
    into.snapshotter = table.text("snapshotter") or into.snapshotter


def _cri_runtime(into: Configuration, table: Table) -> None:
    _runtime(into, table.table("containerd"))


def _transfer(into: Configuration, table: Table) -> None:
    _hosts(into, table, "config_path")


_READ: dict[str, Callable[[Configuration, Table], None]] = {
    CRI: _cri, CRI_IMAGES: _cri_images, CRI_RUNTIME: _cri_runtime, _TRANSFER: _transfer,
    GRPC: _grpc, TTRPC: _ttrpc, **dict.fromkeys(_RESTART_NAMES, _restart),
}  # fmt: skip
"""The plugins whose tables say something of a node. Since version 4 the sockets are plugins, too."""


def _hosts(into: Configuration, table: Table, key: str) -> None:
    """Containerd takes several directories, with colons between; a node has one, the first."""
    first, _, others = table.text(key).partition(":")
    if first:
        into.registry_config = Path(first)
    if others:
        into.warnings.append(f"{table.name(key)}: only {first} is looked at")


def _registry(into: Configuration, table: Table) -> None:
    registry = table.table("registry")
    _hosts(into, registry, "config_path")
    for key in registry.left():
        if registry.set(key):
            into.warnings.append(f"{registry.name(key)}: doesn't apply, hosts are told of in registry.config_path")


def _runtime(into: Configuration, table: Table) -> None:
    """The default runtime: its program, or the name of its shim, from which the program is told."""
    name = table.text("default_runtime_name")
    runtime = table.table("runtimes").table(name) if name else Table({})
    shim = _SHIM.fullmatch(runtime.text("runtime_type"))
    program = runtime.table("options").text("BinaryName") or (shim.group(1) if shim else "")
    into.runtime = program or into.runtime


def _path(table: Table, key: str) -> Path | None:
    text = table.text(key)
    if text and not text.startswith("/"):
        raise InvalidArgument(f"{table.name(key)}: {text!r} must be an absolute path")
    return Path(text) if text else None


def _owner(table: Table, key: str, default: int) -> int:
    number = table.integer(key)
    if not 0 <= number < 0xFFFFFFFF:
        raise InvalidArgument(f"{table.name(key)}: {number} is no user or group")
    return number or default


def _unknown(into: Configuration, table: Table) -> None:
    into.warnings += [f"{table.name(key)}: unknown" for key in table.left()]


def overridden(configuration: Configuration, **given: Any) -> Configuration:
    """The same with what flags say; a flag that isn't given is None."""
    known = {one.name for one in fields(Configuration)}
    for name, value in given.items():
        assert name in known, name
        if value is not None:
            setattr(configuration, name, value)
    return configuration
