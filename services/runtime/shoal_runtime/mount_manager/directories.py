"""The transform `mkdir`: directories that a mount needs, by `X-containerd.mkdir.path=<path>[:<mode>[:<uid>:<gid>]]`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Mount

from shoal_runtime.mount_manager.beneath import parent_of

_PREFIX = "X-containerd.mkdir."
_OPTION = re.compile(r"path=([^:]+)(?::(0?[0-7]{1,3})(?::([0-9]{1,10}):([0-9]{1,10}))?)?")
_MODE = 0o700
_LARGEST_ID = 0xFFFFFFFE
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def with_directories(roots: Sequence[Path], mount: Mount) -> Mount:
    """Makes a mount's directories, and returns it without the options that ask for them.

    One that is there gets the mode and the owner that are asked for. INVALID_ARGUMENT, FAILED_PRECONDITION.
    """
    left = []
    for option in mount.options:
        if option.startswith(_PREFIX):
            _make(roots, option)
        else:
            left.append(option)
    return mount.model_copy(update={"options": left})


def _make(roots: Sequence[Path], option: str) -> None:
    found = _OPTION.fullmatch(option.removeprefix(_PREFIX))
    if found is None:
        raise InvalidArgument(f"option {option}: must be {_PREFIX}path=<path>[:<mode>[:<uid>:<gid>]]")
    path, mode, uid, gid = found.groups()
    if uid is not None and max(int(uid), int(gid)) > _LARGEST_ID:
        raise InvalidArgument(f"option {option}: owners are at most {_LARGEST_ID}")
    with parent_of(roots, path) as (parent, name):
        made = False
        with suppress(FileExistsError):
            os.mkdir(name, _MODE, dir_fd=parent)
            made = True
        try:
            directory = os.open(name, _OPEN, dir_fd=parent)
        except NotADirectoryError:
            raise FailedPrecondition(f"path {path}: is there, and isn't a directory (or is a link)") from None
        try:
            now = os.fstat(directory)
            wanted = stat.S_IMODE(now.st_mode) if mode is None and not made else int(mode or f"{_MODE:o}", 8)
            # What is as it should be may be read-only.
            if uid is not None and (now.st_uid, now.st_gid) != (int(uid), int(gid)):
                os.fchown(directory, int(uid), int(gid))
            if stat.S_IMODE(now.st_mode) != wanted:
                os.fchmod(directory, wanted)
        finally:
            os.close(directory)
