"""NATS's micro protocol: what makes a service show in `nats micro ls`, `info` and `stats`.

nats-py's own classes answer the `$SRV` subjects and keep the figures; ours hand messages to the harness instead of
running handlers one after another, and drain instead of unsubscribing.
"""

from __future__ import annotations

from typing import cast

from nats.micro.service import Endpoint, EndpointConfig, Service

from shoal_bus.connection import Connection, Listener


class AnsweredEndpoint(Endpoint):
    """nats.micro's endpoint for its figures and its INFO; `receive` gets the messages."""

    def __init__(self, service: Service, config: EndpointConfig, receive: Listener) -> None:
        super().__init__(service, config)
        self._receive = receive

    async def _start(self) -> None:
        connection = cast(Connection, self._service._client)
        self._subscription = await connection.listen(self._subject, self._receive, queue=self._queue_group or "")

    async def _stop(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.drain()  # type: ignore[no-untyped-call]

    def count(self, nanoseconds: int, error: str | None) -> None:
        """One more request, how long it took, and the error it ended with."""
        self._num_requests += 1
        self._processing_time += nanoseconds
        self._average_processing_time = self._processing_time // self._num_requests
        if error is not None:
            self._num_errors += 1
            self._last_error = error  # type: ignore[assignment]  # nats-py infers None from its initial value


class MicroService(Service):
    """nats.micro's service, with endpoints that drain."""

    async def answer(
        self, *, name: str, subject: str, queue_group: str, receive: Listener, metadata: dict[str, str]
    ) -> AnsweredEndpoint:
        """Subscribes to `subject`, and shows it."""
        config = EndpointConfig(
            name=name, subject=subject, queue_group=queue_group, metadata=metadata, handler=_never_called
        )
        endpoint = AnsweredEndpoint(self, config, receive)
        await endpoint._start()
        self._endpoints.append(endpoint)
        return endpoint


async def _never_called(_: object) -> None:
    raise AssertionError("requests go to the harness")
