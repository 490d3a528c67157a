"""Random trees, random changes to them, and overlays of several layers made of those."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from shoal_runtime.shim.mounts import mount_all, unmount_all
from shoal_snapshot.copying import copy_tree

_NAMES = ["a", "b", "c", "d.d", "e e", "ü", "n" * 90, ".hidden", "new\nline"]


def grow(root: Path, chance: random.Random, depth: int = 0) -> None:
    """Fills a directory with files of all kinds."""
    files: list[Path] = [p for p in root.iterdir() if p.is_file() and not p.is_symlink()]
    for name in chance.sample(_NAMES, chance.randint(2, 6)):
        path = root / name
        if os.path.lexists(path):
            continue
        kind = chance.randrange(10)
        if kind < 3 and depth < 4:
            path.mkdir()
            grow(path, chance, depth + 1)
            _adorn(path, chance)
        elif kind == 3:
            path.symlink_to(chance.choice(["a", "../b", "/etc/passwd", "x" * 150]))
            os.utime(path, ns=(1, chance.randrange(10**18)), follow_symlinks=False)
        elif kind == 4 and files:
            os.link(chance.choice(files), path)
        elif kind == 5:
            os.mkfifo(path)
            _adorn(path, chance)
        elif kind == 6:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(chance.randrange(1, 9), chance.randrange(300)))
            _adorn(path, chance)
        else:
            path.write_bytes(chance.randbytes(chance.choice([0, 1, 511, 512, 513, 10_000])))
            if chance.random() < 0.2:
                os.truncate(path, 300_000)
            _adorn(path, chance)
            files.append(path)


def change(root: Path, chance: random.Random) -> None:
    """Changes about a third of what is in a tree, by all that one can do to a file."""
    for path in sorted(root.rglob("*"), reverse=True):
        if not os.path.lexists(path) or chance.random() > 0.35:
            continue
        deed = chance.randrange(9)
        directory = path.is_dir() and not path.is_symlink()
        if deed < 2:
            _remove(path)
        elif deed == 2:
            _remove(path)
            path.mkdir()
            grow(path, chance, 3)
        elif deed == 3:
            _remove(path)
            path.write_bytes(b"a file now")
        elif deed == 4 and not path.is_symlink():
            _adorn(path, chance)
        elif deed == 5 and path.is_file() and not path.is_symlink():
            with path.open("r+b") as file:
                file.write(b"changed in place")
        elif deed == 6 and not directory:
            other = path.with_name("linked-" + str(chance.randrange(1000)))
            if not os.path.lexists(other):
                os.link(path, other, follow_symlinks=False)
        elif deed == 7 and directory:
            if chance.random() < 0.5:
                _move(path)
            else:
                grow(path, chance, 3)
        elif not directory and not path.is_symlink():
            os.utime(path, ns=(5, chance.randrange(10**18)))
    grow(root, chance, 2)


def _move(path: Path) -> None:
    """Renames a directory: in place where the file system can, and by a copy where it can't, as mv(1) does."""
    other = path.with_name("moved")
    if not os.path.lexists(other):
        subprocess.run(["mv", str(path), str(other)], check=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _adorn(path: Path, chance: random.Random) -> None:
    os.chown(path, chance.choice([0, 0, 7, 100_000]), chance.choice([0, 0, 12]))
    path.chmod(chance.choice([0o755, 0o644, 0o700, 0o2775, 0o4755]))
    if chance.random() < 0.3 and stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR):
        os.setxattr(path, f"user.{chance.choice('xyz')}", chance.randbytes(6))
    os.utime(path, ns=(1, chance.choice([10**9 * chance.randrange(10**9), chance.randrange(10**18)])))


class Overlaid:
    """An overlay of several layers under one directory, unmounted."""

    def __init__(self, directory: Path, options: Sequence[str] = ("index=off",)) -> None:
        self._directory, self._options = directory, options
        self.lowers = [directory / "lower"]
        """The highest first."""
        self.lowers[0].mkdir(mode=0o755)
        self._number = 0
        self._next()

    def commit(self) -> None:
        """What was changed is a lower layer from here on."""
        self.lowers.insert(0, self._upper)
        self._next()

    def _next(self) -> None:
        self._number += 1
        self._upper = self._directory / f"changes-{self._number}"
        self._work = self._directory / f"work-{self._number}"
        for place in (self._upper, self._work):
            place.mkdir(mode=0o755)

    @property
    def _lowerdir(self) -> str:
        return "lowerdir=" + ":".join(map(str, self.lowers))

    @contextmanager
    def mounted(self, upper: Path | None = None, work: Path | None = None) -> Iterator[Path]:
        """All of it, writable."""
        options = [f"upperdir={upper or self._upper}", f"workdir={work or self._work}", self._lowerdir, *self._options]
        point = self._directory / "merged"
        point.mkdir(exist_ok=True)
        mount_all([{"type": "overlay", "source": "overlay", "options": options}], str(point))
        try:
            yield point
        finally:
            unmount_all(str(point))

    def view(self) -> list[dict[str, Any]]:
        """A mount list of all of it."""
        options = [f"upperdir={self._upper}", f"workdir={self._work}", self._lowerdir]
        return [{"type": "overlay", "source": "overlay", "options": options}]

    def lower(self) -> list[dict[str, Any]]:
        """A mount list of the lower layers."""
        if len(self.lowers) == 1:
            return [{"type": "bind", "source": str(self.lowers[0]), "options": ["ro", "rbind"]}]
        follow = [option for option in self._options if option == "metacopy=on"]
        return [{"type": "overlay", "source": "overlay", "options": [self._lowerdir, *follow]}]

    @contextmanager
    def sibling(self) -> Iterator[tuple[Path, Any]]:
        """An empty directory for another uppermost layer, and what mounts it over the same lower ones."""
        place, work = self._directory / "sibling", self._directory / "sibling-work"
        place.mkdir(mode=0o755)
        work.mkdir()
        status = self._upper.stat()
        os.chown(place, status.st_uid, status.st_gid)
        place.chmod(stat.S_IMODE(status.st_mode))

        def mounted() -> AbstractContextManager[Path]:
            return self.mounted(place, work)

        yield place, mounted
        shutil.rmtree(place)
        shutil.rmtree(work)

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """A copy of what the lower layers make together."""
        place, point = self._directory / "copied", self._directory / "below"
        place.mkdir()
        point.mkdir()
        mount_all(self.lower(), str(point))
        try:
            copy_tree(str(point), str(place))
        finally:
            unmount_all(str(point))
            point.rmdir()
        yield place
        subprocess.run(["rm", "-rf", str(place)], check=True)


@contextmanager
def overlaid(
    directory: Path, chance: random.Random, layers: int, options: Sequence[str] = ("index=off",)
) -> Iterator[Overlaid]:
    """An overlay whose lowest layer is a random tree, and the others changes of what lies below them."""
    place = directory / "overlaid"
    place.mkdir()
    made = Overlaid(place, options)
    grow(made.lowers[0], chance)
    for _ in range(layers - 1):
        with made.mounted() as root:
            change(root, chance)
        made.commit()
    yield made
    subprocess.run(["rm", "-rf", str(place)], check=True)
