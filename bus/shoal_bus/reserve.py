"""Room that is kept for a service's start: a database can't be opened on a disk that is full to the last byte.

SQLite makes the WAL index anew then, and what a service has to undo, which gives back the room, is written down first.
So a file beside the database takes some room while there is some, and goes when it is needed; the next start that finds
room takes it again.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

BYTES = 4 << 20
_SMALL = 8
"""A disk with less than so many times that of room is too small for such a file."""


def take(database: Path) -> None:
    """Takes the room, unless it is taken already. Where there is little, nothing is taken."""
    place = _place(database)
    with suppress(OSError):
        if not place.exists() and shutil.disk_usage(database.parent).free < _SMALL * BYTES:
            return
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, BYTES)
        except OSError:
            place.unlink()
        finally:
            os.close(fd)


def give(database: Path) -> bool:
    """Gives the room back; says whether there was any."""
    try:
        _place(database).unlink()
    except OSError:
        return False
    os.sync()  # some file systems have it free only then
    return True


def _place(database: Path) -> Path:
    return database.with_name(f"{database.name}-reserve")
