"""What the runtime service knows shims by: the names of their directories, and how what ran in them ended."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class ExitRecord:
    """How a process of a container ended: 128 + the signal's number where a signal ended it."""

    namespace: str
    id: str
    pid: int
    exit_status: int
    exited_at: datetime
    exec_id: str = ""
    """Which exec it was; empty for the container's first process."""


@dataclass(frozen=True)
class Found:
    """A container that was there when this copy started: `status` is the shim's word, or `dead` without one."""

    namespace: str
    id: str
    pid: int
    status: str
    bundle: str


def place_of(namespace: str, id: str) -> str:
    """The name of a shim's directory: short, and safe whatever the names."""
    return hashlib.blake2b(f"{namespace}\0{id}".encode(), digest_size=10).hexdigest()


def exit_record(namespace: str, id: str, exit: dict[str, Any], exec_id: str = "") -> ExitRecord:
    """How a process ended, as a shim says it."""
    when = datetime.fromtimestamp(exit["exited_at"], UTC)
    return ExitRecord(namespace, id, int(exit["pid"]), int(exit["exit_status"]), when, exec_id)
