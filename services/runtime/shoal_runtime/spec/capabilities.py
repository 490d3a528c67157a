"""Which capabilities a container's process has (capabilities(7)): the default ones, what a caller adds and drops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shoal_bus.api.runtime import SpecOptions
from shoal_bus.errors import FailedPrecondition, InvalidArgument

from shoal_runtime.spec.defaults import CAPABILITIES

_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
NAMES = [f"CAP_{name}" for name in _NAMES.split()]
"""Every capability there is, at its number (linux/capability.h)."""
_LAST = Path("/proc/sys/kernel/cap_last_cap")


def held_here() -> list[str]:
    """What this process has, and so can give to one that it starts."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            bits = int(line.split()[1], 16)
            return [name for number, name in enumerate(NAMES) if bits >> number & 1]
    return []


def capabilities_of(options: SpecOptions) -> list[str]:
    """The capabilities of a container, in their numbers' order.

    ALL is every one that this process has; a user namespace has every one that the kernel knows. INVALID_ARGUMENT for a
    name that is none, FAILED_PRECONDITION for one asked for by name that can't be given here.
    """
    _check_names([*options.cap_add, *options.cap_drop])
    available = _known_here() if options.uid_mappings else held_here()
    added, dropped = set(options.cap_add), set(options.cap_drop)
    _check_available(added, available)
    if options.privileged or "ALL" in added:
        wanted = set(available) - (dropped - added)
    elif "ALL" in dropped:
        wanted = added
    else:
        wanted = (set(CAPABILITIES) - dropped) | added
    return [name for name in NAMES if name in wanted]


def added_for_exec(spec: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The capabilities that an exec in the container of `spec` has besides; ALL and errors as with a container's."""
    _check_names(names)
    has_users = any(one.get("type") == "user" for one in (spec.get("linux") or {}).get("namespaces") or [])
    available = _known_here() if has_users else held_here()
    _check_available(names, available)
    return available if "ALL" in names else [name for name in NAMES if name in names]


def _check_names(names: Iterable[str]) -> None:
    for name in sorted({*names} - {"ALL", *NAMES}):
        raise InvalidArgument(f"capability {name}: there is no such capability", hint="see capabilities(7)")


def _check_available(names: Iterable[str], available: Sequence[str]) -> None:
    for name in sorted({*names} - {"ALL", *available}):
        raise FailedPrecondition(f"capability {name}: not held on this node, so it can't be given to a container")


def _known_here() -> list[str]:
    try:
        return NAMES[: int(_LAST.read_text(encoding="ascii")) + 1]
    except (OSError, ValueError):
        return NAMES
