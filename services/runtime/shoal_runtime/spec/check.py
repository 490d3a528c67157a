"""What a client's specification must have before it is worth keeping (runtime-spec, config.md)."""

from __future__ import annotations

from typing import Any

from shoal_bus.errors import InvalidArgument


def check_spec(spec: dict[str, Any]) -> None:
    """INVALID_ARGUMENT, naming the field, for a specification that no runtime would take."""
    _text(spec, "ociVersion")
    check_process(_map(spec, "process"))
    _text(_map(spec, "root"), "path", "root.path")
    mounts = spec.get("mounts") or []
    if not isinstance(mounts, list) or not all(isinstance(one, dict) and one.get("destination") for one in mounts):
        raise _wrong("mounts", "must be a list of maps with a destination each")
    if not isinstance(spec.get("linux") or {}, dict):
        raise _wrong("linux", "must be a map")


def check_process(process: dict[str, Any], path: str = "process") -> None:
    """The same of a process: the specification's own, or an exec's."""
    args = process.get("args")
    if not isinstance(args, list) or not args or not all(isinstance(one, str) for one in args) or not args[0]:
        raise _wrong(f"{path}.args", "must be a list of strings with the command first")
    if not _text(process, "cwd", f"{path}.cwd").startswith("/"):
        raise _wrong(f"{path}.cwd", "must be an absolute path")
    env = process.get("env") or []
    if not isinstance(env, list) or not all(isinstance(one, str) for one in env):
        raise _wrong(f"{path}.env", "must be a list of strings")


def check_resources(resources: dict[str, Any], path: str = "linux.resources") -> None:
    """The same of limits: the specification's own, or an update's."""
    if not isinstance(resources, dict) or not resources:
        raise _wrong(path, "must be a map that names a limit")


def _map(spec: dict[str, Any], name: str) -> dict[str, Any]:
    value = spec.get(name)
    if not isinstance(value, dict):
        raise _wrong(name, "must be a map")
    return value


def _text(spec: dict[str, Any], name: str, path: str = "") -> str:
    value = spec.get(name)
    if not isinstance(value, str) or not value:
        raise _wrong(path or name, "must be a text that isn't empty")
    return value


def _wrong(path: str, rule: str) -> InvalidArgument:
    return InvalidArgument(f"spec: {path}: {rule}")
