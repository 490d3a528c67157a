"""Small files, by descriptors alone: Python's file objects and `shutil` are memory in every worker."""

from __future__ import annotations

import os

_CHUNK = 65536


def read(path: str) -> bytes:
    """The whole of a file. OSError when it can't be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _CHUNK)
        if not data:
            return data
        while more := os.read(fd, _CHUNK):
            data += more
        return data
    finally:
        os.close(fd)


def write(path: str, data: bytes, *, sync: bool = False) -> None:
    """Makes a file, or makes it anew, root's alone; with `sync` it is on disk afterwards."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def append(path: str, data: str) -> None:
    """Writes to what is there already, as the files of cgroups are written to. OSError when that is refused."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data.encode())
    finally:
        os.close(fd)


def unlink(path: str) -> None:
    """Removes a file that may be there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove(directory: str) -> None:
    """Removes a directory with the files in it, as far as it is there and can be removed."""
    try:
        for name in os.listdir(directory):
            unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except OSError:
        pass
