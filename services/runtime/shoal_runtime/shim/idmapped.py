"""Mounts whose owners are mapped: `uidmap=…` and `gidmap=…` in a mount's options, as containerd has them.

A mapping is `container:host:size`, several are separated by commas. A bind mount is mapped itself; of an overlay the
lower layers are, while its upper directory belongs to the host's ids already. Loaded when it is needed.
"""

from __future__ import annotations

import ctypes
import os

from shoal_runtime.shim import mounts

OPEN_TREE_CLONE = 1
AT_EMPTY_PATH = 0x1000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_IDMAP = 0x100000
CLONE_NEWUSER = 0x10000000
_OPEN_TREE, _MOUNT_SETATTR, _MOVE_MOUNT = 428, 442, 429

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def split(options: list[str]) -> tuple[list[str], str, str]:
    """A mount's options without its mappings of users and groups, and these; empty where there are none."""
    maps = {"uidmap": "", "gidmap": ""}
    rest = []
    for option in options:
        key, _, value = option.partition("=")
        if key in maps:
            maps[key] = value
        else:
            rest.append(option)
    return rest, maps["uidmap"], maps["gidmap"]


def mount(kind: str, source: str, target: str, options: list[str]) -> None:
    """Mounts one entry whose options have mappings. OSError names what failed."""
    rest, users, groups = split(options)
    userns = _user_namespace(users or groups, groups or users)
    try:
        if kind == "overlay":
            _overlay(source, target, rest, userns)
        else:
            _bind(source, target, rest, userns)
    finally:
        os.close(userns)


def _overlay(source: str, target: str, options: list[str], userns: int) -> None:
    """One mapped mount of the directory that all lower layers lie in takes the place of that directory."""
    lowers = next(option for option in options if option.startswith("lowerdir=")).partition("=")[2].split(":")
    common = os.path.dirname(lowers[0]) if len(lowers) == 1 else os.path.commonpath(lowers)
    tree = _mapped_tree(common, MOUNT_ATTR_IDMAP, userns)
    try:
        mapped = ":".join(f"/proc/self/fd/{tree}/{os.path.relpath(lower, common)}" for lower in lowers)
        swapped = [f"lowerdir={mapped}" if option.startswith("lowerdir=") else option for option in options]
        mounts.mount("overlay", source, target, swapped)
    finally:
        os.close(tree)


def _bind(source: str, target: str, options: list[str], userns: int) -> None:
    flags, propagation, _ = mounts.parse_options(options)
    attributes = MOUNT_ATTR_IDMAP
    for flag, attribute in (
        (mounts.MS_RDONLY, MOUNT_ATTR_RDONLY), (mounts.MS_NOSUID, MOUNT_ATTR_NOSUID),
        (mounts.MS_NODEV, MOUNT_ATTR_NODEV), (mounts.MS_NOEXEC, MOUNT_ATTR_NOEXEC),
    ):  # fmt: skip
        if flags & flag:
            attributes |= attribute
    tree = _mapped_tree(source, attributes, userns)
    try:
        to = target.encode()
        moved = _libc.syscall(_MOVE_MOUNT, tree, b"", mounts.AT_FDCWD, to, mounts.MOVE_MOUNT_F_EMPTY_PATH)
        mounts.check(moved, f"mount bind on {target}")
    finally:
        os.close(tree)
    for flag in propagation:
        mounts.change(target, flag)


def _mapped_tree(path: str, attributes: int, userns: int) -> int:
    """A mount of a directory, attached nowhere, with mapped owners."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = mounts.check(_libc.syscall(_OPEN_TREE, mounts.AT_FDCWD, path.encode(), flags), f"open_tree {path}")
    try:
        wanted = _MountAttr(attributes, 0, 0, userns)
        size = ctypes.sizeof(wanted)
        result = _libc.syscall(_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(wanted), size)
        mounts.check(result, f"id mapping of {path}")
    except BaseException:
        os.close(tree)
        raise
    return tree


def _user_namespace(users: str, groups: str) -> int:
    """A user namespace with these mappings, as an open file: a child makes it, and ends."""
    waiting, ended = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ended)
            if _libc.unshare(CLONE_NEWUSER) == 0:
                os.write(told, b"1")
                os.read(waiting, 1)
        finally:
            os._exit(0)
    try:
        os.close(waiting)
        os.close(told)
        if os.read(ready, 1) != b"1":
            raise OSError(1, os.strerror(1), "a user namespace")
        for name, mappings in (("uid_map", users), ("gid_map", groups)):
            lines = "".join(one.replace(":", " ") + "\n" for one in mappings.split(","))
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, lines.encode())
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ended)
        os.close(ready)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # somebody reaps all of this process's children
