"""A container's limits and its place among the cgroups (runtime-spec, config-linux.md#control-groups)."""

from __future__ import annotations

from typing import Any

from shoal_bus.api.runtime import RunResources, SpecOptions

_MEMORY = {"limit": "memory", "swap": "memory_swap", "reservation": "memory_reservation"}
_CPU = {
    "shares": "cpu_shares", "quota": "cpu_quota", "period": "cpu_period", "cpus": "cpuset_cpus", "mems": "cpuset_mems",
}  # fmt: skip


def resources_of(wanted: RunResources) -> dict[str, Any]:
    """The fields of `linux.resources` that set a limit."""
    groups = {
        "memory": {name: getattr(wanted, field) for name, field in _MEMORY.items()},
        "cpu": {name: getattr(wanted, field) for name, field in _CPU.items()},
        "pids": {"limit": wanted.pids_limit},
        "blockIO": {"weight": wanted.blkio_weight},
    }
    set_ones = {group: {name: value for name, value in fields.items() if value} for group, fields in groups.items()}
    return {group: fields for group, fields in set_ones.items() if fields}


def updated(before: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`linux.resources` with what an update names in the place of what was there: its other limits stay."""
    return {
        **before,
        **{
            name: {**(before.get(name) or {}), **value} if isinstance(value, dict) else value
            for name, value in change.items()
        },
    }


def cgroup_of(options: SpecOptions, namespace: str, id: str) -> str:
    """`linux.cgroupsPath`: containerd's `/<namespace>/<id>`, unless the caller has another."""
    if options.cgroup_parent:
        return f"{options.cgroup_parent.rstrip('/')}/{id}"
    return options.cgroup or f"/{namespace}/{id}"
