"""Files as block devices (loop(4)): for the mount option `loop`, and mounts of that type. Loaded when it is needed.

A device is configured in one call (LOOP_CONFIGURE, since Linux 5.8). With autoclear the kernel lets go of the file when
nobody has the device open, or mounted, any more; so whoever is killed leaves none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from shoal_runtime.shim import mounts

_CONTROL = "/dev/loop-control"
_LOOP_SET_STATUS64, _LOOP_GET_STATUS64, _LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C04, 0x4C05, 0x4C0A, 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16
# struct loop_config (linux/loop.h): the file's descriptor, a block size, and struct loop_info64 from 8 on.
_CONFIG_BYTES, _INFO = 304, slice(8, 240)
_INFO_BYTES = 232
_FLAGS, _NAME = slice(52, 56), slice(56, 120)
_TRIES = 100


def mount(kind: str, source: str, target: str, options: list[str]) -> None:
    """Mounts the file `source`, by a device that goes with the mount; `direct-io` goes past the page cache. OSError."""
    flags = mounts.parse_options(options)[0]
    device, path = attach(source, read_only=bool(flags & mounts.MS_RDONLY), direct="direct-io" in options)
    try:
        mounts.mount(kind, path, target, [one for one in options if one not in ("loop", "direct-io")])
    finally:
        os.close(device)


def attach(source: str, *, read_only: bool = False, direct: bool = False, name: str = "") -> tuple[int, str]:
    """A free device with the file `source` in it: open, and its path. It is free again when it is closed and unused.

    `name` is kept with the device (of a long one the end), for `is_named`. OSError says what of both failed.
    """
    file = os.open(source, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        config = bytearray(_CONFIG_BYTES)
        config[:4] = file.to_bytes(4, "little")
        info = bytearray(_INFO_BYTES)
        flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0) | (_LO_FLAGS_DIRECT_IO if direct else 0)
        info[_FLAGS] = flags.to_bytes(4, "little")
        info[_NAME] = _padded(name or source)
        config[_INFO] = info
        for attempt in range(_TRIES):
            path = _free()
            try:
                device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENXIO):
                    raise
                time.sleep(0.001 * attempt)  # it has just been made, or removed
                continue
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, error.strerror, f"loop device for {source}") from None
                time.sleep(0.001 * attempt)  # somebody else was faster
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), f"loop device for {source}")
    finally:
        os.close(file)


def set_autoclear(device: int, on: bool) -> None:
    """Has an open device let go of its file by itself, or keep it. OSError."""
    info = _status(device)
    flags = int.from_bytes(info[_FLAGS], "little")
    flags = flags | _LO_FLAGS_AUTOCLEAR if on else flags & ~_LO_FLAGS_AUTOCLEAR
    info[_FLAGS] = flags.to_bytes(4, "little")
    fcntl.ioctl(device, _LOOP_SET_STATUS64, info)


def is_named(device: int, name: str) -> bool:
    """Whether an open device has a file in it that was attached under `name`."""
    try:
        return bytes(_status(device)[_NAME]) == _padded(name)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


def _free() -> str:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
    finally:
        os.close(control)


def _status(device: int) -> bytearray:
    info = bytearray(_INFO_BYTES)
    fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
    return info


def _padded(name: str) -> bytes:
    return os.fsencode(name)[-63:].ljust(64, b"\0")
