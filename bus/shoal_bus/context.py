"""What a handler knows of the request it serves, and what it may do on its caller's behalf."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from shoal_bus.client import TIMEOUT_SECONDS, Client
from shoal_bus.database import Transaction
from shoal_bus.message import Message, Request
from shoal_bus.verb import OperationVerb, Verb

if TYPE_CHECKING:
    from shoal_bus.once import Requests

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)


@dataclass
class Context:
    """One request, as its handler sees it."""

    id: str
    """The request's id. A record made for it should keep it, so that a resumed handler knows its own work again."""
    node: str
    namespace: str
    client: Client
    """A client for this request's namespace on this node."""
    trace: str = ""
    ends: float | None = None
    """When the caller gives up, by `time.monotonic`; None where it didn't say."""
    resumed: bool = False
    """This request was begun before, by a copy that died: whatever it did is still there, and must be made whole."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this service is about to stop."""
    log: Any = field(default_factory=structlog.get_logger)
    _requests: Requests | None = None
    _report: Callable[[Message], None] | None = None
    answered: bytes | None = None

    def answer(self, tx: Transaction, reply: Message) -> None:
        """Records the reply in the same transaction as the change that it reports."""
        if self._requests is not None:
            packed = reply.pack()
            self._requests.finish(tx, self.id, packed)
            tx.on_commit(lambda: setattr(self, "answered", packed))

    def progress(self, progress: Message) -> None:
        """Tells the caller of an operation how far it is. Cheap: intermediate states may be skipped."""
        if self._report is not None:
            self._report(progress)

    def left(self) -> float:
        """Seconds the caller still waits."""
        return TIMEOUT_SECONDS if self.ends is None else max(0.0, self.ends - time.monotonic())

    async def call(
        self, verb: Verb[Req, Rep], request: Req, *, step: str, timeout: float = TIMEOUT_SECONDS, patience: float = 30.0
    ) -> Rep:
        """A call to another service as a step of this request: a resumed handler's repeat of it is the same call."""
        return await self.client.call(
            verb, request, id=f"{self.id}.{step}", timeout=timeout, patience=patience, trace=self.trace
        )

    async def operate(
        self,
        verb: OperationVerb[Req, Rep, Pro],
        request: Req,
        *,
        step: str,
        on_progress: Callable[[Pro], object] | None = None,
        timeout: float | None = None,
        patience: float = 30.0,
    ) -> Rep:
        """An operation of another service as a step of this request."""
        return await self.client.operate(
            verb,
            request,
            id=f"{self.id}.{step}",
            on_progress=on_progress,
            timeout=timeout,
            patience=patience,
            trace=self.trace,
        )
