"""What this machine is, in the terms seccomp profiles are written in."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from pathlib import Path

_X32, _GETPID = 0x40000000, 39
_ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")


@functools.cache
def machine() -> str:
    """The kernel's name for the processor (`uname -m`), every 32-bit ARM as `arm`, every 32-bit x86 as `i686`."""
    name = platform.machine()
    return "arm" if name.startswith("armv") else "i686" if re.fullmatch(r"i[3-6]86", name) else name


@functools.cache
def kernel() -> tuple[int, int]:
    """The running kernel's version, without what comes after the second number."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def filters_system_calls() -> bool:
    """Whether the kernel has seccomp's filters (CONFIG_SECCOMP_FILTER)."""
    return _ACTIONS.exists()


@functools.cache
def runs_x32() -> bool:
    """Whether the kernel has the x32 calling convention (64-bit registers, 32-bit pointers): few do.

    Taken for granted where asking could end this process: under a filter of somebody else's.
    """
    if "Seccomp:\t0\n" not in Path("/proc/self/status").read_text(encoding="ascii", errors="replace"):
        return True
    return int(ctypes.CDLL(None).syscall(_X32 + _GETPID)) > 0
