"""The kernel's small text files: read whole, and taken apart.

A cgroup may go away while it is read, and what files it has depends on the kernel: a file that can't be read is None,
and what is made of it is whatever its reader says stands for that.
"""

from __future__ import annotations

import os

_READ_BYTES = 64 << 10


def read(directory: str, name: str) -> str | None:
    """The text of a file, or None where it isn't there, has just gone, or doesn't answer.

    No directory (an empty one) has no files.
    """
    if not directory:
        return None
    try:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = [os.read(fd, _READ_BYTES)]
        while len(chunks[-1]) == _READ_BYTES:
            chunks.append(os.read(fd, _READ_BYTES))
    except OSError:
        return None
    finally:
        os.close(fd)
    return b"".join(chunks).decode(errors="replace")


def number(text: str | None) -> int | None:
    """The number a file consists of; None for none, and for `max`, cgroup v2's word for no limit."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return None


def read_number(directory: str, name: str) -> int | None:
    """The number a file consists of; None for `max`, or where it can't be read."""
    return number(read(directory, name))


def flat(text: str | None) -> dict[str, int]:
    """A flat keyed file (cgroup-v2.rst, "Format"): lines of a key and a number. Other lines are left out."""
    found = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        if (amount := number(value)) is not None:
            found[key] = amount
    return found


def nested(text: str | None) -> dict[str, dict[str, str]]:
    """A nested keyed file: lines of a key and `name=value` pairs. A key without any is left out.

    Some kernels leave the number of an idle device alone on a line, in front of the next one's: the last one counts.
    """
    found = {}
    for line in (text or "").splitlines():
        words = line.split()
        keys = [word for word in words if "=" not in word]
        values = dict(word.split("=", 1) for word in words if "=" in word)
        if keys and values:
            found[keys[-1]] = values
    return found
