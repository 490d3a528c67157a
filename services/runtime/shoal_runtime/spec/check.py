"""What a client's specification must have before it is worth keeping (runtime-spec, config.md)."""

from __future__ import annotations

from typing import Any

from shoal_bus.errors import InvalidArgument


def check_spec(spec: dict[str, Any]) -> None:
    """INVALID_ARGUMENT, naming the field, for a specification that no runtime would take."""
    _text(spec, "ociVersion")
    process = _map(spec, "process")
    args = process.get("args")
    if not isinstance(args, list) or not args or not all(isinstance(one, str) for one in args) or not args[0]:
        raise _wrong("process.args", "must be a list of strings with the command first")
    if not _text(process, "cwd", "process.cwd").startswith("/"):
        raise _wrong("process.cwd", "must be an absolute path")
    env = process.get("env") or []
    if not isinstance(env, list) or not all(isinstance(one, str) for one in env):
        raise _wrong("process.env", "must be a list of strings")
    _text(_map(spec, "root"), "path", "root.path")
    mounts = spec.get("mounts") or []
    if not isinstance(mounts, list) or not all(isinstance(one, dict) and one.get("destination") for one in mounts):
        raise _wrong("mounts", "must be a list of maps with a destination each")
    if not isinstance(spec.get("linux") or {}, dict):
        raise _wrong("linux", "must be a map")


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
