"""Paths below the node's own directories, walked one name at a time: no link leads out of them, nor within them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shoal_bus.errors import FailedPrecondition, InvalidArgument

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def parent_of(roots: Sequence[Path], path: str) -> Iterator[tuple[int, str]]:
    """The directory that `path` is in, open (O_PATH), and its name there.

    INVALID_ARGUMENT for a path that isn't below one of `roots`, FAILED_PRECONDITION where there is no such directory.
    """
    root = next((one for one in roots if path.startswith(f"{one}/")), None)
    names = [name for name in path.removeprefix(str(root)).split("/") if name] if root is not None else []
    if root is None or not names or {".", ".."} & set(names) or "\0" in path:
        raise InvalidArgument(
            f"path {path}: isn't below the node's directories", hint=f"use one below {' or '.join(map(str, roots))}"
        )
    at = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=at)
            except (FileNotFoundError, NotADirectoryError):
                raise FailedPrecondition(f"path {path}: {name} isn't a directory (or is a link)") from None
            os.close(at)
            at = below
        yield at, names[-1]
    finally:
        os.close(at)
