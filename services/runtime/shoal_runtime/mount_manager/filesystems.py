"""The transform `mkfs`: a mount's source made a file with a file system in it, by the options `X-containerd.mkfs.*`.

The file has no name until it is whole, so what a crash leaves is nothing, and of two that make the same one is first.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Mount

from shoal_runtime.mount_manager.beneath import parent_of

_PREFIX = "X-containerd.mkfs."
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_UNITS = ["", "k", "m", "g", "t", "p"]
_KINDS = ("ext2", "ext3", "ext4", "xfs")
_LARGEST = 1 << 62
_SECONDS = 120.0


def with_file_system(roots: Sequence[Path], mount: Mount) -> Mount:
    """Makes the file that a mount's source is, unless it is there, and returns the mount without the options for it.

    Blocks for as long as mkfs takes. INVALID_ARGUMENT, FAILED_PRECONDITION, RESOURCE_EXHAUSTED.
    """
    asked, left = {"fs": "ext4", "uuid": "", "size": ""}, []
    for option in mount.options:
        key, _, value = option.removeprefix(_PREFIX).partition("=")
        if not option.startswith(_PREFIX):
            left.append(option)
        elif key in asked and value:
            asked[key] = value
        else:
            raise InvalidArgument(f"option {option}: must be {_PREFIX}size=, {_PREFIX}fs= or {_PREFIX}uuid=")
    command, size = _command(asked["fs"], asked["uuid"]), _bytes(asked["size"])
    with parent_of(roots, mount.source) as (parent, name):
        if not _is_there(parent, name, mount.source):
            _make(parent, name, mount.source, size, command)
    return mount.model_copy(update={"options": left})


def _command(kind: str, uuid: str) -> list[str]:
    if kind not in _KINDS:
        raise InvalidArgument(f"file system {kind}: can't be made here", hint=f"there are {', '.join(_KINDS)}")
    if uuid and not _UUID.fullmatch(uuid):
        raise InvalidArgument(f"UUID {uuid}: is none")
    if kind == "xfs":
        return ["mkfs.xfs", "-q", *(["-m", f"uuid={uuid}"] if uuid else [])]
    return [f"mkfs.{kind}", "-q", "-F", *(["-U", uuid] if uuid else [])]


def _bytes(text: str) -> int:
    """A size as containerd has it: `67108864`, `64m`, `64MB` and `64MiB` are the same."""
    found = _SIZE.fullmatch(text)
    size = int(float(found[1]) * (1 << 10 * _UNITS.index(found[2].lower()))) if found is not None else 0
    if not 0 < size <= _LARGEST:
        raise InvalidArgument(f"option {_PREFIX}size={text}: must be a number of bytes, as 64MiB")
    return size


def _is_there(parent: int, name: str, path: str) -> bool:
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise FailedPrecondition(f"path {path}: is there, and isn't a file")
    return True


def _make(parent: int, name: str, path: str, size: int, command: list[str]) -> None:
    try:
        file = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        raise FailedPrecondition(f"path {path}: that file system has no unnamed files (O_TMPFILE)") from None
    try:
        try:
            os.ftruncate(file, size)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            raise InvalidArgument(f"path {path}: a file of {size} bytes can't be there") from None
        done = _run([*command, f"/proc/self/fd/{file}"], file)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-300:] or f"ended with status {done.returncode}"
            raise FailedPrecondition(f"{command[0]} of {path} with {size} bytes: {said}")
        os.fsync(file)
        with suppress(FileExistsError):  # somebody else was faster
            os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=parent, follow_symlinks=True)
    finally:
        os.close(file)


def _run(command: list[str], file: int) -> subprocess.CompletedProcess[Any]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=_SECONDS, pass_fds=[file],
        )  # fmt: skip
    except FileNotFoundError:
        package = "xfsprogs" if command[0] == "mkfs.xfs" else "e2fsprogs"
        raise FailedPrecondition(f"{command[0]}: isn't installed", hint=f"install {package}") from None
    except subprocess.TimeoutExpired:
        raise FailedPrecondition(f"{command[0]}: wasn't done in {_SECONDS:.0f} seconds") from None
