"""A configuration as a file, in the newest version of containerd's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from shoal_cli.containerd.configuration import CRI_IMAGES, CRI_RUNTIME, GRPC, NEWEST, RESTART, TTRPC, Configuration
from shoal_cli.containerd.durations import duration_of

Value = str | int | Sequence[str]


def dump(configuration: Configuration) -> str:
    """A file that says the same, and all that can be said; read again and printed, it is the same text."""
    registry = str(configuration.registry_config or "")
    tables: dict[str, Mapping[str, Value]] = {
        "": {
            "version": NEWEST, "root": str(configuration.root), "state": str(configuration.state),
            "oom_score": configuration.oom_score, "imports": configuration.imports,
            "disabled_plugins": [] if configuration.restarts else [RESTART],
        },
        "cgroup": {"path": configuration.cgroup},
        "debug": {"level": configuration.level.replace("warning", "warn")},
        _plugin(GRPC): {"address": str(configuration.address), "uid": configuration.uid, "gid": configuration.gid},
        _plugin(TTRPC): {"address": str(configuration.ttrpc or "")},
        _plugin(CRI_IMAGES): {"snapshotter": configuration.snapshotter},
        f"{_plugin(CRI_IMAGES)}.registry": {"config_path": registry},
        f"{_plugin(CRI_RUNTIME)}.containerd": {"default_runtime_name": "default"},
        f"{_plugin(CRI_RUNTIME)}.containerd.runtimes.default.options": {"BinaryName": configuration.runtime},
        _plugin(RESTART): {"interval": duration_of(configuration.restart_interval)},
    }  # fmt: skip
    return _file(tables | _processors(configuration))


def dump_processors(configuration: Configuration) -> str:
    """The stream processors alone, as the snapshot service reads them."""
    return _file(_processors(configuration))


def _processors(configuration: Configuration) -> dict[str, Mapping[str, Value]]:
    return {f"stream_processors.{_toml(name)}": asdict(one) for name, one in configuration.stream_processors.items()}


def _file(tables: Mapping[str, Mapping[str, Value]]) -> str:
    lines = []
    for name, values in tables.items():
        lines += ["", f"[{name}]"] if name else []
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _plugin(name: str) -> str:
    return f'plugins."{name}"'


def _toml(value: Value) -> str:
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in value)
    return f'"{escaped}"'
