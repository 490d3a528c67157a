"""Where a process's cgroups are: each controller is looked up in the hierarchy that has it, wherever it is mounted.

A container's own cgroup is the one its specification names. Its first process may have gone deeper (a systemd in it
does), and a process that isn't below it in some hierarchy shares that one with others: its figures aren't the
container's. That is the guard against a pid that somebody else has by now, too: nobody else is in there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal_bus.api.runtime import CgroupMode

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Places:
    """Directories of one container: `v1` by controller, `v2` its only one, or empty where it has none there."""

    mode: CgroupMode
    v1: Mapping[str, str] = field(default_factory=dict)
    v2: str = ""

    def __bool__(self) -> bool:
        return bool(self.v1 or self.v2)

    def directories(self) -> set[str]:
        """All of them."""
        return {*self.v1.values(), self.v2} - {""}


class _Mounted(NamedTuple):
    root: str
    """The cgroup that is mounted, `/` for the whole hierarchy."""
    point: str


@dataclass(frozen=True)
class Hierarchies:
    """The machine's cgroup hierarchies, as this process sees them mounted. `v1` by controller."""

    v1: Mapping[str, _Mounted] = field(default_factory=dict)
    v2: _Mounted | None = None

    @property
    def mode(self) -> CgroupMode:
        """Which versions there are."""
        if self.v2 is None:
            return "legacy"
        return "hybrid" if self.v1 else "unified"

    @classmethod
    def parse(cls, mountinfo: str) -> Hierarchies:
        """From `/proc/<pid>/mountinfo` (proc(5)). Of several mounts of one hierarchy the one of most of it counts."""
        v1: dict[str, _Mounted] = {}
        v2: _Mounted | None = None
        for line in mountinfo.splitlines():
            before, _, after = line.partition(" - ")
            mount, filesystem = before.split(" "), after.split(" ")
            if len(mount) < 5 or filesystem[0] not in ("cgroup", "cgroup2"):
                continue
            found = _Mounted(_unescaped(mount[3]), _unescaped(mount[4]))
            if filesystem[0] == "cgroup2":
                v2 = _wider(v2, found)
                continue
            for option in filesystem[2].split(",") if len(filesystem) > 2 else ():
                if option not in ("rw", "ro") and "=" not in option:
                    v1[option] = _wider(v1.get(option), found)
        return cls(v1, v2)

    def membership(self, path: str) -> str:
        """What `/proc/<pid>/cgroup` would say of a process that is in `path` in every hierarchy."""
        return "\n".join(f"0:{controller}:{path}" for controller in ("", *self.v1))

    def places(self, membership: str, own: Sequence[str]) -> Places:
        """Where the cgroups of a process are that has `membership`: the text of `/proc/<pid>/cgroup` (cgroups(7)).

        `own` is what the path of the container's own cgroup ends with, as `own_cgroup` says.
        """
        v1: dict[str, str] = {}
        v2 = ""
        for controllers, path in _memberships(membership):
            if (cut := _down_to(path, own)) is None:
                continue
            if not controllers:
                v2 = _directory(self.v2, cut) if self.v2 is not None else ""
                continue
            for controller in controllers:
                if controller in self.v1 and (directory := _directory(self.v1[controller], cut)):
                    v1[controller] = directory
        return Places(self.mode, v1, v2)


def own_cgroup(cgroups_path: str, id: str) -> tuple[str, ...]:
    """The last components of a container's cgroup, from its specification's `linux.cgroupsPath`.

    >>> own_cgroup("/default/web", "web"), own_cgroup("system.slice:shoal:web", "web"), own_cgroup("", "web")
    (('default', 'web'), ('shoal-web.scope',), ('web',))

    The form with colons is that of systemd's cgroup driver, which makes a scope; without any, runtimes take the id.
    """
    parts = cgroups_path.split(":")
    if len(parts) == 3 and "/" not in cgroups_path:
        _, prefix, name = parts
        if name.endswith(".slice"):
            return (name,)
        return (f"{prefix}-{name}.scope" if prefix else f"{name}.scope",)
    plain = os.path.normpath(f"/{cgroups_path}").strip("/")
    return tuple(plain.split("/")) if plain else (id,)


def _memberships(text: str) -> Iterator[tuple[list[str], str]]:
    """Controllers (none for cgroup v2) and path of each line."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield [name for name in controllers.split(",") if name], path


def _down_to(path: str, own: Sequence[str]) -> str | None:
    """`path` as far as the container's own cgroup, or None where it isn't in there."""
    parts = path.strip("/").split("/")
    for end in range(len(own), len(parts) + 1):
        if parts[end - len(own) : end] == list(own):
            return "/" + "/".join(parts[:end])
    return None


def _directory(mounted: _Mounted, path: str) -> str:
    """The directory of a cgroup, or empty where it is outside of what is mounted."""
    root = mounted.root.rstrip("/")
    if not f"{path}/".startswith(f"{root}/"):
        return ""
    return mounted.point.rstrip("/") + path[len(root) :]


def _wider(one: _Mounted | None, other: _Mounted) -> _Mounted:
    return other if one is None or len(other.root) < len(one.root) else one


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found.group(1), 8)), path)
