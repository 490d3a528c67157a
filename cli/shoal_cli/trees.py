"""Trees as text: each thing on a line, below what it lies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def branches(parents: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The keys of `parents` (each with its parent's key, or with one that isn't there), with what stands before them.

    >>> for before, key in branches({"b": "a", "a": "", "c": "a", "d": "b"}):
    ...     print(before + key)
    a
    ├─ b
    │  └─ d
    └─ c
    """
    children: dict[str, list[str]] = {}
    for key, parent in sorted(parents.items()):
        children.setdefault(parent if parent in parents else "", []).append(key)
    # What is still to be shown, the next one last: as deep as the chain is, and nothing here recurses.
    waiting = [("", "", key) for key in reversed(children.get("", []))]
    while waiting:
        before, below, key = waiting.pop()
        yield before, key
        own = children.get(key, [])
        for at, child in reversed(list(enumerate(own))):
            last = at == len(own) - 1
            waiting.append((below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), child))
