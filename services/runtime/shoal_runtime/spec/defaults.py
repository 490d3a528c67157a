"""What every container gets: containerd's defaults (its pkg/oci, spec.go and mounts.go)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OCI_VERSION = "1.0.2"
"""The oldest runtime-spec that has all we use; every runtime in use reads it."""

ROOTFS = "rootfs"
"""`root.path`: where, in the bundle, the rootfs is mounted."""

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
]

MASKED_PATHS = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
]

READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

NAMESPACES = ["pid", "ipc", "uts", "mount"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def mounts(*, unified: bool) -> list[dict[str, Any]]:
    """The file systems every container has; its cgroups too where they are the unified kind (cgroup v2)."""
    cgroup = [_mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro")]
    return [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        *(cgroup if unified else []),
        _mount("/run", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
    ]


def device_rules() -> list[dict[str, Any]]:
    """Every device is denied but these: any may be made by mknod, and the usual harmless ones used."""
    usual = [(1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2)]
    return [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
        *(
            {"allow": True, "type": "c", "major": major, "access": "rwm"} | ({} if minor is None else {"minor": minor})
            for major, minor in usual
        ),
    ]


def rlimits() -> list[dict[str, Any]]:
    """The limits of every container's processes."""
    return [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]


def cgroups_are_unified() -> bool:
    """Whether this machine has cgroup v2 alone; with v1, or both (hybrid), the controllers are v1's."""
    return (_CGROUP_ROOT / "cgroup.controllers").exists()


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}
