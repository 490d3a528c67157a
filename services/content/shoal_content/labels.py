"""Labels: how they are kept, and how a request changes them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Labels

UNCOMPRESSED = "containerd.io/uncompressed"
"""The label of a layer's blob that names its diff ID, as containerd's clients look for it."""


def dump(labels: Labels) -> str:
    """Labels as a column holds them."""
    return json.dumps(labels, sort_keys=True)


def load(column: str) -> Labels:
    """The labels of a column."""
    return dict(json.loads(column))


def updated(labels: Labels, given: Labels, fields: Sequence[str], name: str = "labels") -> Labels:
    """`labels` after an update: all replaced, or those that `fields` names; one given without a value goes.

    Another map than the labels is updated by its `name`.
    """
    if not fields or name in fields:
        return {key: value for key, value in given.items() if value}
    changed = dict(labels)
    for path in fields:
        prefix, _, key = path.partition(".")
        if prefix != name or not key:
            raise InvalidArgument(f"field {path!r}: can't be changed", hint="labels.<key> can")
        if given.get(key):
            changed[key] = given[key]
        else:
            changed.pop(key, None)
    return changed
