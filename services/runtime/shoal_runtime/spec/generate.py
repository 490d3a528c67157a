"""An OCI runtime specification from an image's configuration (image-spec, config.md; runtime-spec, config.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal_bus.api.runtime import Hook, Hooks, IdMapping, Rlimit, SpecOptions
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Mount

from shoal_runtime.spec import defaults
from shoal_runtime.spec.capabilities import capabilities_of
from shoal_runtime.spec.devices import devices_of
from shoal_runtime.spec.mounts import mounts_of
from shoal_runtime.spec.resources import cgroup_of, resources_of
from shoal_runtime.spec.seccomp import profile_of
from shoal_runtime.spec.users import find_groups, find_user

_HOOKS = {
    "prestart": "prestart", "create_runtime": "createRuntime", "create_container": "createContainer",
    "start_container": "startContainer", "poststart": "poststart", "poststop": "poststop",
}  # fmt: skip


def generate_spec(
    namespace: str,
    id: str,
    image: dict[str, Any],
    rootfs: Sequence[Mount],
    options: SpecOptions,
    *,
    terminal: bool = False,
    netns: str = "",
    host_network: bool = False,
    resolv_conf: bool = False,
) -> dict[str, Any]:
    """The specification of container `id`. `image` is the image's configuration, `rootfs` its snapshot's mounts.

    Users and groups are looked up in what `rootfs` describes, which needn't be mounted. `netns` is the path of a
    network namespace to join; without one, and without the host's, it gets one of its own. `resolv_conf` gives it the
    host's /etc/resolv.conf. INVALID_ARGUMENT when there is no command, or no such user; FAILED_PRECONDITION for what
    this node hasn't got. Reads files: it belongs on a thread.
    """
    unified = defaults.cgroups_are_unified()
    process = _process(image.get("config") or {}, rootfs, options, terminal=terminal)
    devices, rules = devices_of(options)
    linux: dict[str, Any] = {
        "resources": {"devices": rules, **resources_of(options.resources)},
        "cgroupsPath": cgroup_of(options, namespace, id),
        "namespaces": _namespaces(options, netns, host_network=host_network, unified=unified),
        "maskedPaths": _paths(options.masked_paths, defaults.MASKED_PATHS, options),
        "readonlyPaths": _paths(options.readonly_paths, defaults.READONLY_PATHS, options),
    }
    optional = {
        "devices": devices,
        "seccomp": profile_of(
            options.seccomp, process["capabilities"]["bounding"], privileged=options.privileged
        ),
        "sysctl": _sysctl(options),
        "rootfsPropagation": options.rootfs_propagation,
        "uidMappings": _id_map(options.uid_mappings),
        "gidMappings": _id_map(options.gid_mappings),
    }  # fmt: skip
    linux |= {name: value for name, value in optional.items() if value}
    spec = {
        "ociVersion": defaults.OCI_VERSION,
        "process": process,
        "root": {"path": defaults.ROOTFS, "readonly": options.read_only},
        "mounts": mounts_of(options, unified=unified, host_network=host_network, resolv_conf=resolv_conf),
        "annotations": dict(options.annotations),
        "linux": linux,
    }
    if options.uts_mode == "private":
        spec["hostname"] = options.hostname or id[:63]
    if hooks := _hooks(options.hooks):
        spec["hooks"] = hooks
    return spec


def _process(
    config: dict[str, Any], rootfs: Sequence[Mount], options: SpecOptions, *, terminal: bool
) -> dict[str, Any]:
    cwd = options.cwd or config.get("WorkingDir") or "/"
    if not cwd.startswith("/"):
        raise InvalidArgument(f"cwd {cwd!r}: must be an absolute path")
    user = find_user(rootfs, options.user or config.get("User") or "")
    groups = dict.fromkeys([*user.additional_gids, *find_groups(rootfs, options.group_add)])
    capabilities = capabilities_of(options)
    process: dict[str, Any] = {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(groups)},
        "args": _args(config, options.args),
        "env": _environment(config.get("Env") or [], options.env, terminal=terminal),
        "cwd": cwd,
        "capabilities": {kind: list(capabilities) for kind in ("bounding", "permitted", "effective")},
        "rlimits": _rlimits(options.rlimits),
        "noNewPrivileges": options.no_new_privileges,
    }
    if terminal and options.console_size is not None:
        process["consoleSize"] = options.console_size.model_dump()
    if options.oom_score_adj is not None:
        process["oomScoreAdj"] = options.oom_score_adj
    return process


def _args(config: dict[str, Any], given: Sequence[str]) -> list[str]:
    """The image's entrypoint, then what the caller gives, or else the image's own arguments."""
    args = list(config.get("Entrypoint") or []) + list(given or config.get("Cmd") or [])
    if not args or not args[0]:
        raise InvalidArgument("no command: the image has none", hint="give one after the image")
    return args


def _environment(image: Sequence[str], given: Sequence[str], *, terminal: bool) -> list[str]:
    """The image's variables, TERM with a terminal, then the caller's; of two with one name the later wins."""
    variables: dict[str, str] = {}
    base = list(image) if any(one.startswith("PATH=") for one in image) else [defaults.PATH, *image]
    for one in [*base, *(["TERM=xterm"] if terminal else []), *given]:
        name, equals, _ = one.partition("=")
        if not name or "\0" in one:
            raise InvalidArgument(f"env {one!r}: must be NAME=VALUE")
        if equals:
            variables[name] = one
        else:
            variables.pop(name, None)  # a name alone takes the image's variable away, as with containerd
    return list(variables.values())


def _rlimits(given: Sequence[Rlimit]) -> list[dict[str, Any]]:
    limits = {one["type"]: one for one in defaults.rlimits()}
    limits.update((one.type, {"type": one.type, "hard": one.hard, "soft": one.soft}) for one in given)
    return list(limits.values())


def _namespaces(options: SpecOptions, netns: str, *, host_network: bool, unified: bool) -> list[dict[str, Any]]:
    modes = {"pid": options.pid_mode, "ipc": options.ipc_mode, "uts": options.uts_mode, "mount": "private"}
    if unified:
        modes["cgroup"] = "private"
    modes["network"] = "host" if host_network else netns or "private"
    if options.uid_mappings:
        modes["user"] = "private"
    return [
        {"type": kind} | ({"path": mode} if mode != "private" else {})
        for kind, mode in modes.items()
        if mode != "host"
    ]  # fmt: skip


def _paths(given: Sequence[str] | None, usual: Sequence[str], options: SpecOptions) -> list[str]:
    return list(given) if given is not None else [] if options.privileged else list(usual)


def _sysctl(options: SpecOptions) -> dict[str, str]:
    # Runtimes before runtime-spec 1.1 don't know `domainname`: the parameter that it sets is known to all.
    domain = {"kernel.domainname": options.domainname} if options.domainname else {}
    return {**domain, **options.sysctl}


def _id_map(given: Sequence[IdMapping]) -> list[dict[str, int]]:
    return [{"containerID": one.container_id, "hostID": one.host_id, "size": one.size} for one in given]


def _hooks(given: Hooks) -> dict[str, list[dict[str, Any]]]:
    found = {name: [_hook(one) for one in getattr(given, field)] for field, name in _HOOKS.items()}
    return {name: hooks for name, hooks in found.items() if hooks}


def _hook(hook: Hook) -> dict[str, Any]:
    return hook.model_dump(exclude_none=True, exclude_defaults=True)
