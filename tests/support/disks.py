"""Small file systems of a test's own, on loop devices."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


@contextmanager
def disk(directory: Path, size: int, mkfs: Sequence[str], options: str = "loop") -> Iterator[Path]:
    """A file system of `size` bytes made by a command, mounted below a directory."""
    image, point = directory / "disk", directory / "disk-mounted"
    point.mkdir()
    with image.open("wb") as made:
        made.truncate(size)
    subprocess.run([*mkfs, str(image)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", options, str(image), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
        image.unlink()


@contextmanager
def btrfs(directory: Path, size: int = 256 * MIB) -> Iterator[Path]:
    """A btrfs."""
    with disk(directory, size, ["mkfs.btrfs", "-q", "-M"]) as point:
        yield point


@contextmanager
def xfs(directory: Path, size: int = 320 * MIB) -> Iterator[Path]:
    """An XFS: its files belong to projects, and share their bytes."""
    with disk(directory, size, ["mkfs.xfs", "-q"]) as point:
        yield point
