"""An OCI runtime specification from an image's configuration (image-spec, config.md; runtime-spec, config.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Mount

from shoal_runtime.spec import defaults
from shoal_runtime.spec.users import User, find_user

ROOTFS = "rootfs"
_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")


@dataclass(frozen=True)
class SpecOptions:
    """What the caller wants otherwise than the image says. Empty means: as the image, or the default, has it."""

    args: Sequence[str] = ()
    env: Sequence[str] = ()
    cwd: str = ""
    user: str = ""
    hostname: str = ""
    terminal: bool = False
    read_only: bool = False
    host_network: bool = False
    netns: str = ""
    """The network namespace to join, as a path; without one, and without the host's, it gets one of its own."""
    resolv_conf: bool = False
    """Give it the host's /etc/resolv.conf."""
    annotations: dict[str, str] = field(default_factory=dict)


def generate_spec(
    namespace: str, id: str, image: dict[str, Any], rootfs: Sequence[Mount], options: SpecOptions
) -> dict[str, Any]:
    """The specification of container `id`. `image` is the image's configuration, `rootfs` its snapshot's mounts.

    The user is looked up in what `rootfs` describes, which needn't be mounted. INVALID_ARGUMENT when there is no
    command, or no such user. Reads files: it belongs on a thread.
    """
    config = image.get("config") or {}
    user = find_user(rootfs, options.user or config.get("User") or "")
    unified = defaults.cgroups_are_unified()
    namespaces = [{"type": kind} for kind in defaults.NAMESPACES]
    if unified:
        namespaces.append({"type": "cgroup"})
    if not options.host_network:
        namespaces.append({"type": "network"} | ({"path": options.netns} if options.netns else {}))
    return {
        "ociVersion": defaults.OCI_VERSION,
        "process": _process(config, user, options),
        "root": {"path": ROOTFS, "readonly": options.read_only},
        "hostname": options.hostname or id[:63],
        "mounts": defaults.mounts(unified=unified) + _host_files(options),
        "annotations": dict(options.annotations),
        "linux": {
            "resources": {"devices": defaults.device_rules()},
            "cgroupsPath": f"/{namespace}/{id}",
            "namespaces": namespaces,
            "maskedPaths": list(defaults.MASKED_PATHS),
            "readonlyPaths": list(defaults.READONLY_PATHS),
        },
    }


def _process(config: dict[str, Any], user: User, options: SpecOptions) -> dict[str, Any]:
    cwd = options.cwd or config.get("WorkingDir") or "/"
    if not cwd.startswith("/"):
        raise InvalidArgument(f"cwd {cwd!r}: must be an absolute path")
    return {
        "terminal": options.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": _args(config, options.args),
        "env": _environment(config.get("Env") or [], options),
        "cwd": cwd,
        "capabilities": {kind: list(defaults.CAPABILITIES) for kind in ("bounding", "permitted", "effective")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    }


def _args(config: dict[str, Any], given: Sequence[str]) -> list[str]:
    """The image's entrypoint, then what the caller gives, or else the image's own arguments."""
    args = list(config.get("Entrypoint") or []) + list(given or config.get("Cmd") or [])
    if not args or not args[0]:
        raise InvalidArgument("no command: the image has none", hint="give one after the image")
    return args


def _environment(image: Sequence[str], options: SpecOptions) -> list[str]:
    """The image's variables, TERM with a terminal, then the caller's; of two with one name the later wins."""
    variables: dict[str, str] = {}
    base = list(image) if any(one.startswith("PATH=") for one in image) else [defaults.PATH, *image]
    for one in [*base, *(["TERM=xterm"] if options.terminal else []), *options.env]:
        name, equals, _ = one.partition("=")
        if not name or "\0" in one:
            raise InvalidArgument(f"env {one!r}: must be NAME=VALUE")
        if equals:
            variables[name] = one
        else:
            variables.pop(name, None)  # a name alone takes the image's variable away, as with containerd
    return list(variables.values())


def _host_files(options: SpecOptions) -> list[dict[str, Any]]:
    wanted = _HOST_FILES if options.host_network else _HOST_FILES[:1] if options.resolv_conf else ()
    return [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
        for path in wanted
        if Path(path).is_file()
    ]
