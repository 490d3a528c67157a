"""Devices of the node in a container: the nodes it gets, and what its cgroup lets it do with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from shoal_bus.api.runtime import RunDevice, SpecOptions
from shoal_bus.errors import FailedPrecondition

from shoal_runtime.spec.defaults import device_rules

_NOT_DEVICES = {"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"}
"""Of /dev, what a container has of its own or what is made for somebody else."""


def devices_of(options: SpecOptions) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`linux.devices` and `linux.resources.devices`. FAILED_PRECONDITION for a path that is no device.

    A later device with the same path takes the place of an earlier one.
    """
    nodes: dict[str, dict[str, Any]] = {}
    rules = [{"allow": True, "access": "rwm"}] if options.privileged else device_rules()
    if options.privileged:
        nodes.update((node["path"], node) for node in _below("/dev", "/dev"))
    for wanted in options.devices:
        found = list(_wanted(wanted))
        nodes.update((node["path"], node) for node in found)
        rules += [
            {key: node[key] for key in ("type", "major", "minor")} | {"allow": True, "access": wanted.permissions}
            for node in found
        ]
    return list(nodes.values()), rules


def _wanted(device: RunDevice) -> Iterator[dict[str, Any]]:
    target = device.container_path or device.path
    try:
        path = os.path.realpath(device.path, strict=True)
        if os.path.isdir(path):  # noqa: PTH112
            found = list(_below(path, target))
        else:
            node = _node(path, target)
            found = [node] if node is not None else []
    except OSError as error:
        raise FailedPrecondition(f"device {device.path}: {(error.strerror or '').lower()} on this node") from None
    if not found:
        raise FailedPrecondition(f"device {device.path}: there is no device on this node")
    yield from found


def _below(directory: str, target: str) -> Iterator[dict[str, Any]]:
    """Every device below a directory, which may change while it is read."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.name in _NOT_DEVICES or entry.is_symlink():
                continue
            if entry.is_dir():
                yield from _below(entry.path, f"{target}/{entry.name}")
                continue
            try:
                node = _node(entry.path, f"{target}/{entry.name}")
            except FileNotFoundError:
                continue
            if node is not None:
                yield node


def _node(path: str, target: str) -> dict[str, Any] | None:
    status = os.lstat(path)
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return None
    return {
        "path": target,
        "type": "c" if stat.S_ISCHR(status.st_mode) else "b",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": status.st_mode & 0o777,
        "uid": status.st_uid,
        "gid": status.st_gid,
    }
