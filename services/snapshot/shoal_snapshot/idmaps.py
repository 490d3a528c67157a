"""ID mappings of snapshots: the labels that ask for them, the mount options that carry them, and whether they work.

A mapping is `container:host:size` (all numbers), several of them separated by commas. In a mount's options it is
`uidmap=…` and `gidmap=…`, as in containerd; whoever mounts the list makes the mount, or overlayfs's lower layers,
ID-mapped mounts (mount_setattr(2)).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_bus.api.snapshot import GID_MAPPING_LABEL, UID_MAPPING_LABEL
from shoal_bus.errors import FailedPrecondition, InvalidArgument

from shoal_snapshot import mounting

CLONE_NEWUSER = 0x10000000
_MAX_MAPPINGS = 340  # as many as /proc/<pid>/uid_map takes
_ONE = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})")
_libc = ctypes.CDLL(None, use_errno=True)
_supported: dict[int, bool] = {}

IdMapping = tuple[int, int, int]
"""First id in the container, first id on the host, how many."""


def parse(text: str, label: str) -> list[IdMapping]:
    """The mappings of a label. INVALID_ARGUMENT if they are none."""
    found = []
    for one in text.split(","):
        match = _ONE.fullmatch(one)
        mapping = tuple(int(number) for number in match.groups()) if match else (0, 0, 0)
        inside, outside, size = mapping
        if size < 1 or max(inside, outside) + size > 0xFFFFFFFF:
            raise InvalidArgument(f"label {label}: {one[:60]!r} isn't container:host:size", hint="as 0:100000:65536")
        found.append((inside, outside, size))
    if len(found) > _MAX_MAPPINGS:
        raise InvalidArgument(f"label {label}: more than {_MAX_MAPPINGS} mappings")
    return found


def mappings_of(labels: Mapping[str, str]) -> tuple[list[IdMapping], list[IdMapping]] | None:
    """The mappings of users and of groups that a snapshot's labels ask for. INVALID_ARGUMENT for half of them."""
    users, groups = labels.get(UID_MAPPING_LABEL, ""), labels.get(GID_MAPPING_LABEL, "")
    if not users and not groups:
        return None
    if not users or not groups:
        raise InvalidArgument(f"labels {UID_MAPPING_LABEL} and {GID_MAPPING_LABEL}: one without the other")
    return parse(users, UID_MAPPING_LABEL), parse(groups, GID_MAPPING_LABEL)


def idmap_options(labels: Mapping[str, str]) -> list[str]:
    """The mount options of the mappings that a snapshot's labels ask for; none for none."""
    if mappings_of(labels) is None:
        return []
    return [f"uidmap={labels[UID_MAPPING_LABEL]}", f"gidmap={labels[GID_MAPPING_LABEL]}"]


def host_id(mappings: list[IdMapping], id: int) -> int:
    """What an id in the container is on the host. FAILED_PRECONDITION if it is nothing there."""
    for inside, outside, size in mappings:
        if inside <= id < inside + size:
            return outside + id - inside
    raise FailedPrecondition(f"id {id}: the snapshot's ID mappings don't have it", hint="map 0, too")


def supports_idmaps(directory: str, *, demanded: bool = False) -> bool:
    """Whether the file system of a directory can be mounted with mapped owners: tried once for each of them.

    With `demanded`, FAILED_PRECONDITION if it can't.
    """
    device = Path(directory).stat().st_dev
    if device not in _supported:
        _supported[device] = _tried(directory)
    if demanded and not _supported[device]:
        raise FailedPrecondition(
            f"{directory}: its file system can't be mounted with mapped owners", hint="leave the ID mapping labels out"
        )
    return _supported[device]


def _tried(directory: str) -> bool:
    try:
        with user_namespace([(0, 1000, 1)], [(0, 1000, 1)]) as userns:
            mount = mounting.open_tree(directory)
            try:
                mounting.set_idmap(mount, userns)
            finally:
                os.close(mount)
    except OSError:
        return False
    return True


@contextmanager
def user_namespace(users: list[IdMapping], groups: list[IdMapping]) -> Iterator[int]:
    """A new user namespace with these mappings, which nobody lives in, as an open file."""
    waiting, ended = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:  # nothing but system calls here: other threads' locks are as they were
        code = 1
        try:
            os.close(ended)
            if _libc.unshare(CLONE_NEWUSER) == 0:
                os.write(told, b"1")
                os.read(waiting, 1)
                code = 0
        finally:
            os._exit(code)
    try:
        os.close(told)
        os.close(waiting)
        if os.read(ready, 1) != b"1":
            raise OSError(1, "a user namespace can't be made")
        for name, mappings in (("uid_map", users), ("gid_map", groups)):
            lines = "".join(f"{inside} {outside} {size}\n" for inside, outside, size in mappings)
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, lines.encode())
            finally:
                os.close(fd)
        userns = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ended)
        os.close(ready)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    try:
        yield userns
    finally:
        os.close(userns)
