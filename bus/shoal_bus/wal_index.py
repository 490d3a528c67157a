"""SQLite's WAL index (`<database>-shm`) on a file system that copies on write.

SQLite maps that file, shared between the processes that have the database open, and has its room allocated when it
grows. On btrfs that isn't enough: a page that was written back needs room anew when it is changed, and on a full disk
whoever changes it, if only to note that he reads, is killed by SIGBUS. A file with FS_NOCOW_FL (linux/fs.h, chattr(1))
is changed in its place, by newer kernels also through a mapping: a full disk is told as SQLITE_FULL then.

Only an empty file takes the flag. The directory could hand it down, but to all that is ever made below it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_NOCOW_FL = 0x00800000


def prepare(database: Path) -> None:
    """Makes the WAL index of a database that is about to be opened, if there is none, a file that is changed in place.

    Nothing happens where the file system doesn't know that, as those that don't copy on write.
    """
    with suppress(OSError):
        fd = os.open(f"{database}-shm", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size == 0:
                flags = bytearray(struct.calcsize("l"))
                fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
                changed = struct.pack("l", struct.unpack("l", flags)[0] | FS_NOCOW_FL)
                fcntl.ioctl(fd, FS_IOC_SETFLAGS, changed)
        finally:
            os.close(fd)
