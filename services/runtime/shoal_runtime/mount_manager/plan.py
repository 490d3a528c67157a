"""Which mounts of a list are made here, and which are left to whoever uses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Mount

FORMAT, MKDIR, MKFS, LOOP = "format", "mkdir", "mkfs", "loop"
_TRANSFORMS = frozenset({FORMAT, MKDIR, MKFS})


@dataclass(frozen=True)
class Step:
    """One mount of a list: its type without the transforms, and these, in the order they are done."""

    mount: Mount
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is mounted here (`here`), and what is left: with `bound`, a bind mount of the last one of `here`."""

    here: Sequence[Step]
    left: Sequence[Step]
    bound: bool = False


def may_need_one(mounts: Sequence[Mount]) -> bool:
    """Whether a list is worth a look: one of an image's snapshot, as a rule, isn't."""
    return any("/" in mount.type or mount.type == LOOP for mount in mounts)


def plan_of(mounts: Sequence[Mount], *, temporary: bool = False, allowed: Collection[str] = ()) -> Plan | None:
    """How a list is activated; None if nothing of it needs to be. INVALID_ARGUMENT for a type that is none.

    Everything before a mount that is transformed has to be there, and everything up to one that only we can make.
    """
    steps = [_step(mount) for mount in mounts]
    if temporary and steps:
        if steps[-1].mount.type == LOOP:
            raise InvalidArgument("the last mount of a temporary activation must be a file system, not a loop device")
        return Plan(here=steps, left=[], bound=True)
    here = -1
    for number, (mount, step) in enumerate(zip(mounts, steps, strict=True)):
        if step.transforms and not _is_left(mount.type, step, allowed):
            here = number
        if step.mount.type == LOOP and LOOP not in allowed:
            here = number + 1
    if here < 0:
        return None
    first = [
        Step(mount) if _is_left(mount.type, step, allowed) else step
        for mount, step in list(zip(mounts, steps, strict=True))[here : here + 1]
    ]
    return Plan(here=steps[:here], left=first + [Step(mount) for mount in mounts[here + 1 :]])


def _is_left(kind: str, step: Step, allowed: Collection[str]) -> bool:
    return kind in allowed or all(f"{transform}/*" in allowed for transform in step.transforms)


def _step(mount: Mount) -> Step:
    if any("\0" in text for text in (mount.type, mount.source, mount.target, *mount.options)):
        raise InvalidArgument(f"mount {mount.type!r}: has a zero byte in it")
    transforms, kind = [], mount.type
    while (found := kind.partition("/"))[1] and found[0] in _TRANSFORMS:
        transforms.append(found[0])
        kind = found[2]
    if transforms and not kind:
        raise InvalidArgument(f"mount type {mount.type}: has no type behind its transforms")
    # Paths for the others may come from templates, so these are filled in first, wherever they stand.
    ordered = sorted(dict.fromkeys(transforms), key=lambda name: name != FORMAT)
    return Step(mount.model_copy(update={"type": kind}), tuple(ordered))
