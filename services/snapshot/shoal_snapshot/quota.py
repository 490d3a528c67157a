"""How much may be written to a snapshot, by the project quotas of its file system (quotactl(2), ext4 and XFS).

A snapshot's directories belong to a project of its own, whose id follows from the snapshot's; what is made in them
inherits it. Quotas must be enforced by the mount (`prjquota`): one that isn't is not counted either.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shoal_bus.api.snapshot import SIZE_LABEL
from shoal_bus.errors import FailedPrecondition, InvalidArgument

from shoal_snapshot.mounting import call

FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FS_XFLAG_PROJINHERIT = 0x200
_FSXATTR = "IIIII8x"  # struct fsxattr: flags, extent size, extents, project id, copy-on-write extent size
_QUOTACTL_FD = 443
PRJQUOTA = 2
Q_GETFMT, Q_SETQUOTA = 0x800004, 0x800008
QIF_BLIMITS = 1
_FIRST_PROJECT = 1 << 30
_SIZE = re.compile(r"(\d{1,15})([kKMG]?)")
_UNITS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _Limits(ctypes.Structure):
    """struct if_dqblk; block limits are KiB."""

    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in ("bhard", "bsoft", "space", "ihard", "isoft", "inodes", "btime", "itime")
        ),
        ("valid", ctypes.c_uint32),
    ]


def size_of(labels: Mapping[str, str]) -> int:
    """The bytes that a snapshot's label allows. INVALID_ARGUMENT if it says no such thing."""
    match = _SIZE.fullmatch(labels[SIZE_LABEL])
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < size < 1 << 60:
        raise InvalidArgument(
            f"label {SIZE_LABEL}: {labels[SIZE_LABEL][:60]!r} isn't a size", hint="in bytes, or as 10G"
        )
    return size


class ProjectQuota:
    """The project quotas of the file system that a directory is on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.works = self._tried()
        """Whether they are enforced."""

    def limit(self, id: int, size: int, directories: Sequence[Path]) -> None:
        """Lets no more than `size` bytes be written to these empty directories. FAILED_PRECONDITION if it can't."""
        if not self.works:
            raise FailedPrecondition(
                f"label {SIZE_LABEL}: {self._directory} is on a file system without project quotas",
                hint="mount it with prjquota (ext4, XFS), or leave the label out",
            )
        project = project_of(id)
        self._set(project, max(1, size // 1024))
        for directory in directories:
            assign(directory, project)

    def forget(self, id: int) -> None:
        """Takes a snapshot's limit away."""
        if self.works:
            with suppress(OSError):  # there was none
                self._set(project_of(id), 0)

    def _set(self, project: int, kibibytes: int) -> None:
        limits = _Limits(bhard=kibibytes, bsoft=kibibytes, valid=QIF_BLIMITS)
        self._call(Q_SETQUOTA, project, limits)

    def _tried(self) -> bool:
        try:
            self._call(Q_GETFMT, 0, ctypes.c_uint32())
        except OSError:
            return False
        return True

    def _call(self, command: int, project: int, data: ctypes.Structure | ctypes.c_uint32) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            call(_QUOTACTL_FD, "quotactl", fd, command << 8 | PRJQUOTA, project, ctypes.byref(data))
        finally:
            os.close(fd)


def project_of(id: int) -> int:
    """The project of a snapshot."""
    return _FIRST_PROJECT + id % _FIRST_PROJECT


def assign(directory: Path, project: int) -> None:
    """Has an empty directory, and what is made in it, belong to a project."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags, extent, extents, _, cow = struct.unpack(_FSXATTR, fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28)))
        new = struct.pack(_FSXATTR, flags | FS_XFLAG_PROJINHERIT, extent, extents, project, cow)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, new)
    finally:
        os.close(fd)
