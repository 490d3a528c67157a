"""A verb and who handles it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from shoal_bus.context import Context
from shoal_bus.message import Request
from shoal_bus.verb import AnyVerb


@dataclass(frozen=True)
class Registered:
    """A verb, its handler, what it locks, and how an operation that nobody wants any more is undone."""

    verb: AnyVerb
    handler: Any
    lock: Callable[[Any], str] | None = None
    undo: Callable[[Context, Any], Awaitable[None]] | None = None
    begins_itself: bool = False
    """Its handler records the request itself, in its first transaction."""

    @property
    def name(self) -> str:
        """The verb's short name, as `runtime.task.start`."""
        return self.verb.name

    def lock_key(self, namespace: str, request: Request) -> str:
        """The lock a request needs; empty for none."""
        return f"{namespace} {self.lock(request)}" if self.lock is not None else ""
