"""Mounts a snapshot's `Mount` list on a directory, and takes it away again: mount(2) by ctypes.

Options are those of mount(8): the ones with a flag of their own become flags, all others go to the file system as data;
those with mappings of owners, the option `loop`, and mounts of type `fuse3.<program>` are the affair of `idmapped`,
`loopback` and `fuse`. A bind mount with further flags needs a second call for them; overlayfs data longer than a page
is given piece by piece through the new mount API (fsconfig(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os

from shoal_runtime.shim import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 0x1, 0x2, 0x4, 0x8, 0x10
MS_REMOUNT, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 0x20, 0x80, 0x400, 0x800
MS_BIND, MS_REC, MS_SILENT = 0x1000, 0x4000, 0x8000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8

FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_RDONLY = 0x1
AT_FDCWD = -100
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429

_PAGE = 4096

# option: (flag, whether the option clears it)
_FLAGS = {
    "ro": (MS_RDONLY, False), "rw": (MS_RDONLY, True),
    "nosuid": (MS_NOSUID, False), "suid": (MS_NOSUID, True),
    "nodev": (MS_NODEV, False), "dev": (MS_NODEV, True),
    "noexec": (MS_NOEXEC, False), "exec": (MS_NOEXEC, True),
    "sync": (MS_SYNCHRONOUS, False), "async": (MS_SYNCHRONOUS, True),
    "remount": (MS_REMOUNT, False), "dirsync": (MS_DIRSYNC, False),
    "noatime": (MS_NOATIME, False), "atime": (MS_NOATIME, True),
    "nodiratime": (MS_NODIRATIME, False), "diratime": (MS_NODIRATIME, True),
    "relatime": (MS_RELATIME, False), "norelatime": (MS_RELATIME, True),
    "strictatime": (MS_STRICTATIME, False), "lazytime": (MS_LAZYTIME, False),
    "bind": (MS_BIND, False), "rbind": (MS_BIND | MS_REC, False),
    "silent": (MS_SILENT, False), "defaults": (0, False),
}  # fmt: skip
_PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def check(result: int, what: str) -> int:
    """What a system call returned; OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def parse_options(options: list[str]) -> tuple[int, list[int], list[str]]:
    """mount(8)'s options as flags, propagation flags (each a call of its own), and data."""
    flags, propagation, data = 0, [], []
    for option in options:
        if option in _FLAGS:
            flag, clears = _FLAGS[option]
            flags = flags & ~flag if clears else flags | flag
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        else:
            data.append(option)
    return flags, propagation, data


def mount(kind: str, source: str, target: str, options: list[str]) -> None:
    """Mounts one entry on `target`. OSError names what failed."""
    for option in options:
        if option.startswith("X-containerd."):
            raise OSError(
                errno.EINVAL, f"option {option}: the type {kind} doesn't take it", f"mount {kind} on {target}"
            )
    if "loop" in options:
        from shoal_runtime.shim import loopback  # few containers need it, and it would be in every shim

        loopback.mount(kind, source, target, options)
        return
    if any(option.startswith(("uidmap=", "gidmap=")) for option in options):
        from shoal_runtime.shim import idmapped

        idmapped.mount(kind, source, target, options)
        return
    if kind.startswith(("fuse3.", "fuse.")):
        from shoal_runtime.shim import fuse

        fuse.mount(kind, source, target, options)
        return
    flags, propagation, data = parse_options(options)
    joined = ",".join(data)
    if kind == "overlay" and len(joined) >= _PAGE:
        _mount_long_overlay(source, target, data, flags)
    else:
        _mount(source, target, "" if flags & MS_BIND else kind, flags, joined)
        if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):
            # A bind takes no other flags in the same call.
            _mount("", target, "", flags & ~MS_REC | MS_REMOUNT, "")
    for flag in propagation:
        change(target, flag)


def change(target: str, flags: int) -> None:
    """Changes how a mount is propagated."""
    _mount("", target, "", flags, "")


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    check(result, f"mount {kind or 'bind'} on {target}")


def _mount_long_overlay(source: str, target: str, data: list[str], flags: int) -> None:
    """An overlay of so many layers that its options don't fit a page: one fsconfig(2) call for each layer."""
    fs = check(_libc.syscall(_FSOPEN, b"overlay", FSOPEN_CLOEXEC), "fsopen overlay")
    try:
        _set(fs, "source", source)
        for option in data:
            key, _, value = option.partition("=")
            if key == "lowerdir":
                for layer in value.split(":"):
                    _set(fs, "lowerdir+", layer)
            elif value:
                _set(fs, key, value)
            else:
                check(_libc.syscall(_FSCONFIG, fs, FSCONFIG_SET_FLAG, key.encode(), None, 0), f"overlay option {key}")
        check(_libc.syscall(_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0), "overlay")
        attributes = MOUNT_ATTR_RDONLY if flags & MS_RDONLY else 0
        made = check(_libc.syscall(_FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes), "fsmount overlay")
        try:
            moved = _libc.syscall(_MOVE_MOUNT, made, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
            check(moved, f"mount overlay on {target}")
        finally:
            os.close(made)
    finally:
        os.close(fs)


def _set(fs: int, key: str, value: str) -> None:
    result = _libc.syscall(_FSCONFIG, fs, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
    check(result, f"overlay option {key}")


def mount_all(mounts: list[dict[str, Any]], root: str) -> None:
    """Mounts a whole list on `root`, in order; what was mounted is taken away again when one fails."""
    done = 0
    try:
        for entry in mounts:
            target = os.path.join(root, entry.get("target", "").lstrip("/")) if entry.get("target") else root
            mount(entry["type"], entry["source"], target, list(entry.get("options", [])))
            done += 1
    except BaseException:
        if done:
            unmount_all(root)
        raise


def unmount_all(root: str) -> None:
    """Takes away everything that is mounted on `root` itself or below it; nothing there is no error."""
    for point in reversed(mounts_below(root)):
        unmount(point)


def unmount(point: str) -> None:
    """Takes one mount away, at once if it can be, lazily if something still uses it."""
    for flags in (UMOUNT_NOFOLLOW, UMOUNT_NOFOLLOW | MNT_DETACH):
        if _libc.umount2(point.encode(), flags) == 0:
            return
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):
            return  # not a mount point (any more)
        if number != errno.EBUSY:
            raise OSError(number, os.strerror(number), f"umount {point}")


def mounts_below(root: str) -> list[str]:
    """The mount points at and below `root`, in the order they were made."""
    root = os.path.realpath(root)
    found = []
    for line in files.read("/proc/self/mountinfo").splitlines():
        point = _unescape(line.split()[4]).decode(errors="surrogateescape")
        if point == root or point.startswith(root + "/"):
            found.append(point)
    return found


def _unescape(field: bytes) -> bytes:
    """mountinfo's octal escapes (proc(5)) undone."""
    if b"\\" not in field:
        return field
    for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
        field = field.replace(code, bytes([int(code[1:], 8)]))
    return field
