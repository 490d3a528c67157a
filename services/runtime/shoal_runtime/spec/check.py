"""What a client's specification must be before it is worth keeping: OCI's shape, and nothing that no runtime can do.

runtime-spec, config.md and config-linux.md. What isn't known is left alone, as the specification says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal_bus.errors import InvalidArgument

from shoal_runtime.spec.defaults import ROOTFS
from shoal_runtime.spec.schema import Wrong
from shoal_runtime.spec.shape import check_process as check_process_shape
from shoal_runtime.spec.shape import check_resources as check_resources_shape
from shoal_runtime.spec.shape import check_seccomp_profile, check_shape

_LAST_ID = 2**32 - 1
"""One more than the largest: -1 stands for none."""


def check_spec(spec: dict[str, Any]) -> None:
    """INVALID_ARGUMENT, naming the field, for a specification that no runtime would take."""
    _told("spec", _check_all, spec)


def check_run_spec(spec: dict[str, Any], *, terminal: bool) -> None:
    """The same for the specification of a run, whose rootfs and terminal are made for it."""

    def check(spec: dict[str, Any]) -> None:
        _check_all(spec)
        if spec["root"]["path"].rstrip("/") != ROOTFS:
            raise Wrong(f"must be {ROOTFS}: the image's file system is mounted there", "root.path")
        if bool(spec["process"].get("terminal")) is not terminal:
            raise Wrong(f"must be {str(terminal).lower()}, as the run has it", "process.terminal")

    _told("spec", check, spec)


def check_process(process: dict[str, Any]) -> None:
    """The same for the process of an exec."""
    _told("process", _check_process, process)


def check_resources(resources: dict[str, Any]) -> None:
    """The same for an update of `linux.resources`, which names a limit at least."""
    if not resources:
        raise InvalidArgument("resources: must name a limit", hint="""as {"memory": {"limit": 1048576}}""")
    _told("resources", check_resources_shape, resources)


def check_seccomp(profile: dict[str, Any]) -> None:
    """The same for a seccomp profile."""
    _told("seccomp", check_seccomp_profile, profile)


def _told(what: str, check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except Wrong as wrong:
        raise InvalidArgument(f"{what}: {wrong}") from None


def _within(step: str, check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except Wrong as wrong:
        raise wrong.within(step) from None


def _check_all(spec: dict[str, Any]) -> None:
    check_shape(spec)
    _within("process", _check_more_of_process, spec["process"])
    linux = spec.get("linux") or {}
    namespaces = _check_namespaces(linux)
    if spec.get("hostname") and "uts" not in namespaces:
        raise Wrong("needs a uts namespace of its own: it would be the node's", "hostname")
    if spec.get("domainname") and "uts" not in namespaces:
        raise Wrong("needs a uts namespace of its own: it would be the node's", "domainname")
    for kind in ("uidMappings", "gidMappings"):
        if linux.get(kind) and "user" not in namespaces:
            raise Wrong("needs a user namespace among linux.namespaces", f"linux.{kind}")
        _check_id_map(linux.get(kind) or [], f"linux.{kind}")
    for index, device in enumerate(linux.get("devices") or []):
        if device["type"] != "p" and (device.get("major") is None or device.get("minor") is None):
            raise Wrong("needs major and minor, unless it is a FIFO", f"linux.devices[{index}]")


def _check_process(process: dict[str, Any]) -> None:
    check_process_shape(process)
    _check_more_of_process(process)


def _check_more_of_process(process: dict[str, Any]) -> None:
    if not process["args"] or not process["args"][0]:
        raise Wrong("must begin with the command", "args")
    seen = set()
    for index, limit in enumerate(process.get("rlimits") or []):
        path = f"rlimits[{index}]"
        if limit["type"] in seen:
            raise Wrong(f"{limit['type']} is there twice", path)
        if limit["soft"] > limit["hard"]:
            raise Wrong(f"soft {limit['soft']} is above hard {limit['hard']}", path)
        seen.add(limit["type"])


def _check_namespaces(linux: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for index, namespace in enumerate(linux.get("namespaces") or []):
        if namespace["type"] in found:
            raise Wrong(f"{namespace['type']} is there twice", f"linux.namespaces[{index}]")
        found.add(namespace["type"])
    return found


def _check_id_map(maps: list[dict[str, int]], path: str) -> None:
    for side in ("containerID", "hostID"):
        ends = 0
        for first, size in sorted((one[side], one["size"]) for one in maps):
            if first < ends or first + size > _LAST_ID:
                raise Wrong(f"ranges of {side} overlap, or end above the largest id", path)
            ends = first + size
