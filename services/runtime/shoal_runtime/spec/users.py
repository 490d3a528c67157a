"""Who a process runs as: a user by number or by name, looked up in the container's own /etc/passwd and /etc/group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Mount

from shoal_runtime.spec.layers import read_file

MAX_ID = 2**31 - 1
"""runc's limit, and so containerd's."""
_PASSWD, _GROUP = "etc/passwd", "etc/group"


@dataclass(frozen=True)
class User:
    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class _Passwd:
    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class _Group:
    name: str
    gid: int
    members: frozenset[str]


def find_user(rootfs: Sequence[Mount], text: str) -> User:
    """The user that `user[:group]` stands for in `rootfs`, with the groups /etc/group lists it in; empty means root.

    A number needs no entry: its group is 0 then. INVALID_ARGUMENT for a name that isn't there.
    """
    name, colon, group_name = text.partition(":")
    if not name and colon:
        raise InvalidArgument(f"user {text!r}: must be user or user:group")
    passwd = [_Passwd(f[0], uid, gid) for f, uid, gid in _entries(read_file(rootfs, _PASSWD), 2, 3)]
    groups = _groups(rootfs)
    number = _number(name or "0", f"user {text!r}")
    if number is not None:
        entry = next((p for p in passwd if p.uid == number), None)
        uid, gid = number, entry.gid if entry else 0
    else:
        entry = next((p for p in passwd if p.name == name), None)
        if entry is None:
            raise InvalidArgument(
                f"user {name!r}: not in the image's /etc/passwd", hint="give a number, or another user"
            )
        uid, gid = entry.uid, entry.gid
    if colon:
        gid = _group(groups, group_name, f"user {text!r}")
    member = entry.name if entry is not None else None
    more = (g.gid for g in groups if member in g.members and g.name != member)
    # The primary group is in the list too, or leaving it (setgroups) would pass by files that deny it (CVE-2022-2995).
    return User(uid, gid, tuple(dict.fromkeys((gid, *more))))


def find_groups(rootfs: Sequence[Mount], names: Sequence[str]) -> list[int]:
    """The ids of groups by number or by a name in `rootfs`. INVALID_ARGUMENT for a name that isn't there."""
    if not names:
        return []
    groups = _groups(rootfs)
    return [_group(groups, name, f"group {name!r}") for name in names]


def _groups(rootfs: Sequence[Mount]) -> list[_Group]:
    return [
        _Group(f[0], gid, frozenset(filter(None, f[3].split(",") if len(f) > 3 else ())))
        for f, gid, _ in _entries(read_file(rootfs, _GROUP), 2, 2)
    ]


def _group(groups: Sequence[_Group], name: str, what: str) -> int:
    number = _number(name, what)
    if number is not None:
        return number
    found = next((g.gid for g in groups if g.name == name), None)
    if found is None:
        raise InvalidArgument(f"{what}: no group {name!r} in the image's /etc/group", hint="give a number")
    return found


def _number(value: str, what: str) -> int | None:
    if not (value.isascii() and value.isdigit()):
        return None
    if len(value) > 10 or int(value) > MAX_ID:
        raise InvalidArgument(f"{what}: {value} is out of range, at most {MAX_ID} is allowed")
    return int(value)


def _entries(data: bytes | None, *numbers: int) -> list[tuple[list[str], int, int]]:
    """The lines of a passwd or group file with two fields as numbers; lines that aren't entries are skipped."""
    found = []
    for line in (data or b"").decode(errors="replace").splitlines():
        fields = line.strip().split(":")
        if line.startswith("#") or len(fields) <= max(numbers):
            continue
        first, second = (fields[n] for n in numbers)
        if first.isdigit() and second.isdigit() and max(int(first), int(second)) <= MAX_ID:
            found.append((fields, int(first), int(second)))
    return found
