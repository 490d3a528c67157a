"""One gRPC call, as its servicer sees it: whose it is, how long it has, and the bus on its behalf."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from shoal_bus import wire
from shoal_bus.client import TIMEOUT_SECONDS, Client
from shoal_bus.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ShoalError
from shoal_bus.identifiers import check_identifier
from shoal_bus.message import Message, Request
from shoal_bus.together import to_its_end
from shoal_bus.verb import AnyVerb, OperationVerb, StreamVerb, Verb

log = structlog.get_logger(__name__)

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)

NAMESPACE_HEADER = "containerd-namespace"
LEASE_HEADER = "containerd-lease"
TRACE_HEADER = "traceparent"
PATIENCE_SECONDS = 3.0
"""How long a call waits for a service that isn't there: as long as one takes to be started again."""
UNDO_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call. Cheap to make: nothing here is computed before it is asked for."""

    id: str
    """Of this call; requests on the bus derive theirs from it."""
    method: str
    metadata: dict[str, str]
    ends: float | None
    """When the client gives up, by `time.monotonic`; None where it didn't say."""
    _client: Client

    @classmethod
    def of(cls, method: str, metadata: dict[str, str], remaining: float | None, client: Client) -> Call:
        """The call that gRPC's metadata and deadline describe."""
        ends = None if remaining is None else time.monotonic() + remaining
        return cls(wire.new_id(), method, metadata, ends, client)

    @property
    def namespace(self) -> str:
        """The caller's namespace. FAILED_PRECONDITION where it gave none, INVALID_ARGUMENT where it can't be one."""
        namespace = self.metadata.get(NAMESPACE_HEADER, "")
        if not namespace:
            raise FailedPrecondition("namespace is required", hint=f"set the {NAMESPACE_HEADER} header")
        return check_identifier(namespace, "namespace")

    @property
    def lease(self) -> str:
        """The lease under which the caller makes what it makes; empty for none. INVALID_ARGUMENT.

        Clients call theirs what they like: a path, or digits and dashes.
        """
        lease = self.metadata.get(LEASE_HEADER, "")
        if len(lease) > wire.LONGEST_LEASE or not lease.isprintable():
            raise InvalidArgument(
                f"lease {lease[:40]!r}: must be printable, of {wire.LONGEST_LEASE} characters at most"
            )
        return lease

    @property
    def log(self) -> Any:
        """A logger that names this call."""
        return log.bind(
            request=self.id, method=self.method, namespace=self.metadata.get(NAMESPACE_HEADER, ""), trace=self.trace
        )

    @property
    def trace(self) -> str:
        """The W3C trace context it came with."""
        return self.metadata.get(TRACE_HEADER, "")

    @property
    def largest(self) -> int:
        """How many bytes one request on the bus may have."""
        return self._client.connection.max_payload - wire.HEADROOM

    def left(self) -> float:
        """Seconds the client still waits, at most what one call on the bus may take."""
        return TIMEOUT_SECONDS if self.ends is None else min(TIMEOUT_SECONDS, max(0.0, self.ends - time.monotonic()))

    async def ask(
        self,
        verb: Verb[Req, Rep],
        request: Req,
        *,
        step: str = "",
        namespace: str = "",
        patience: float = PATIENCE_SECONDS,
        long: bool = False,
    ) -> Rep:
        """The reply of the service that answers `verb`, within the time that is left.

        A call that sends the same verb more than once names its `step`, since each is done once by its id. A verb that
        waits, or is asked for `long` work, may take as long as the client does. `namespace` is another one than the
        caller's; `patience` is for a service that isn't there.
        """
        return await self._on(verb, namespace).call(
            verb, request, id=f"{self.id}.{step or verb.name}", patience=patience, trace=self.trace,
            timeout=self._limit() if verb.waits or long else self.left(),
        )  # fmt: skip

    async def make(self, verb: Verb[Req, Rep], request: Req, undo: Callable[[Rep], Awaitable[None]]) -> Rep:
        """`ask`, for what has to go again where nobody is told of it: the client has gone, or its time is up.

        The service isn't stopped halfway: what it makes is waited for, and undone whole.
        """
        making = asyncio.create_task(
            self._on(verb).call(
                verb, request, id=f"{self.id}.{verb.name}", patience=PATIENCE_SECONDS, trace=self.trace,
                timeout=self.left() + TIMEOUT_SECONDS,
            )
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.left()):
                return await asyncio.shield(making)
        except TimeoutError:
            await to_its_end(self._unmake(making, undo))
            raise DeadlineExceeded(f"{verb.name}: no answer in time") from None
        except asyncio.CancelledError:
            await to_its_end(self._unmake(making, undo))
            raise

    async def _unmake(self, making: asyncio.Task[Rep], undo: Callable[[Rep], Awaitable[None]]) -> None:
        with suppress(ShoalError):
            await undo(await making)
            self.log.info("call.undone")

    async def undo(self, verb: Verb[Req, Rep], request: Req, *, step: str = "") -> None:
        """Undoes what this call began, in a time of its own, as the client's may be up; best effort."""
        with suppress(ShoalError):
            await self._on(verb).call(
                verb, request, id=f"{self.id}.{step or verb.name}", timeout=UNDO_SECONDS, patience=UNDO_SECONDS / 2,
                trace=self.trace,
            )  # fmt: skip

    async def operate(
        self,
        verb: OperationVerb[Req, Rep, Pro],
        request: Req,
        *,
        step: str = "",
        on_progress: Callable[[Pro], object] | None = None,
    ) -> Rep:
        """The result of long work, which is cancelled when the client goes away or its time is up."""
        return await self._on(verb).operate(
            verb, request, id=f"{self.id}.{step or verb.name}", timeout=self._limit(), patience=PATIENCE_SECONDS,
            trace=self.trace, on_progress=on_progress,
        )  # fmt: skip

    def items(self, verb: StreamVerb[Req, Rep], request: Req) -> AsyncIterator[Rep]:
        """The items that the service streams, within the time that is left."""
        client = self._on(verb)
        return client.stream(verb, request, timeout=self._limit(), patience=PATIENCE_SECONDS, trace=self.trace)

    def _limit(self) -> float | None:
        return None if self.ends is None else max(0.0, self.ends - time.monotonic())

    def _on(self, verb: AnyVerb, namespace: str = "") -> Client:
        if verb.behaviour.whole_node:
            return self._client
        client = self._client.with_namespace(namespace or self.namespace)
        return client.with_lease(self.lease) if self.lease else client
