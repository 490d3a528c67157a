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
def ext4_with_quotas(directory: Path, size: int = 64 * MIB) -> Iterator[Path]:
    """An ext4 that counts projects' blocks, and enforces their limits."""
    mkfs = ["mkfs.ext4", "-q", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota"]
    with disk(directory, size, mkfs, "loop,prjquota") as point:
        yield point
