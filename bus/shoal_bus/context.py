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
    from shoal_bus.once import Intent, Requests

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
    lease: str = ""
    """The lease that what this request makes belongs to; none unless its caller named one. `client` doesn't pass it on:
    which of a handler's own calls are made under it is the handler's business."""
    trace: str = ""
    ends: float | None = None
    """When the caller gives up, by `time.monotonic`; None where it didn't say."""
    resumed: bool = False
    """This request was begun before, by a copy that died: whatever it did is still there, and must be made whole."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this service is about to stop."""
    log: Any = field(default_factory=structlog.get_logger)
    _requests: Requests | None = None
    _intent: Intent | None = None
    """The request, as long as it isn't recorded: of a handler that does that itself."""
    _begun_in: Transaction | None = None
    _report: Callable[[Message], None] | None = None
    answered: bytes | None = None

    def begin(self, tx: Transaction) -> None:
        """Records the request in a transaction of its handler's, if it isn't yet: see `Service.handle`."""
        if self._requests is not None and self._intent is not None and self._begun_in is not tx:
            self._requests.record(tx, self._intent)
            self._begins_in(tx)

    def answer(self, tx: Transaction, reply: Message) -> None:
        """Records the reply in the same transaction as the change that it reports."""
        if self._requests is None:
            return
        packed = reply.pack()
        if self._intent is None or self._begun_in is tx:
            self._requests.finish(tx, self.id, packed)
        else:
            self._requests.record(tx, self._intent, packed)
            self._begins_in(tx)
        tx.on_commit(lambda: setattr(self, "answered", packed))

    def _begins_in(self, tx: Transaction) -> None:
        self._begun_in = tx  # until it has committed, another transaction would have to record the request again
        tx.on_commit(lambda: setattr(self, "_intent", None))

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
