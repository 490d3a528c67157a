"""The mounts of a container: the default ones, fitted to its namespaces, and the caller's in or behind their places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal_bus.api.runtime import IdMapping, RunMount, SpecOptions
from shoal_bus.errors import FailedPrecondition

from shoal_runtime.spec import defaults

_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")


def mounts_of(options: SpecOptions, *, unified: bool, host_network: bool, resolv_conf: bool) -> list[dict[str, Any]]:
    """`mounts`, in the order they are made. FAILED_PRECONDITION for a bind whose source isn't there.

    One with a default's destination takes its place, so that what is mounted below it still is.
    """
    made = {mount["destination"]: mount for mount in defaults.mounts(unified=unified)}
    if options.ipc_mode == "host":
        made["/dev/shm"] = _bind("/dev/shm", "/dev/shm")  # noqa: S108
    if options.uid_mappings:
        _fit_terminals(made["/dev/pts"], options.gid_mappings)
    if options.privileged:
        for mount in made.values():
            mount["options"] = ["rw" if one == "ro" else one for one in mount["options"]]
    for path in _HOST_FILES if host_network else _HOST_FILES[:1] if resolv_conf else ():
        if Path(path).is_file():
            made[path] = _bind(path, path, "ro")
    for wanted in options.mounts:
        made[_clean(wanted.destination)] = _mount(wanted)
    return list(made.values())


def _mount(wanted: RunMount) -> dict[str, Any]:
    options: Sequence[str] = wanted.options
    if wanted.is_bind:
        if not os.path.lexists(wanted.source):
            raise FailedPrecondition(
                f"mount {wanted.destination}: {wanted.source} is not there on this node", hint="make it first"
            )
        if {"bind", "rbind"}.isdisjoint(options):
            options = ["rbind", *options]
    return {
        "destination": _clean(wanted.destination),
        "type": "bind" if wanted.is_bind else wanted.type,
        "source": wanted.source or wanted.type,
        "options": list(options),
    }


def _clean(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def _fit_terminals(mount: dict[str, Any], groups: Sequence[IdMapping]) -> None:
    """Terminals belong to group tty, unless the user namespace has no such group: the mount would fail."""
    options = []
    for option in mount["options"]:
        name, _, value = option.partition("=")
        if name == "gid" and not any(g.container_id <= int(value) < g.container_id + g.size for g in groups):
            continue
        options.append(option)
    mount["options"] = options
