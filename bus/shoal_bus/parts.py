"""Replies in parts: sent with a window, an end mark, and a word now and then while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

from shoal_bus import wire
from shoal_bus.errors import ShoalError, from_exception
from shoal_bus.mux import Mailbox, Mux


class Stopped(Exception):
    """Nobody wants the rest: the receiver said so, or has gone."""


class PartSender:
    """One sequence of parts under way to `reply`. Whatever piles up while a part is on its way goes into the next.

    A receiver may be as slow as it likes: the sender runs at most a window ahead, and waits. It learns that the
    receiver has gone from the server, which answers a part that nobody listens for.
    """

    def __init__(self, mux: Mux, reply: str, end_headers: Mapping[str, str] | None = None) -> None:
        self._mux, self._reply = mux, reply
        self._end_headers = dict(end_headers or {})
        self._size = wire.part_size(mux.connection.max_payload)
        self._buffer = bytearray()
        self._changed, self._emptied = asyncio.Event(), asyncio.Event()
        self._acknowledged = 0
        self._done = self._stopped = False
        self._error: ShoalError | None = None
        self.cause: Exception | None = None
        """The exception behind the error, for the log."""

    async def send(self, values: AsyncIterator[bytes]) -> ShoalError | None:
        """Sends all of `values`, and returns the error that ended them, if one did. Raises `Stopped`."""
        await self._mux.start()
        box = self._mux.open()
        tasks = [asyncio.create_task(self._produce(values)), asyncio.create_task(self._listen(box))]
        try:
            await self._send_parts(box)
        finally:
            self._mux.close(box)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._error

    async def _produce(self, values: AsyncIterator[bytes]) -> None:
        try:
            async for value in values:
                self._buffer += value
                self._changed.set()
                while len(self._buffer) > 2 * self._size:
                    self._emptied.clear()
                    await self._emptied.wait()
        except Exception as error:  # noqa: BLE001 (told to the caller as what ended the sequence)
            self._error = from_exception(error)
            self.cause = error
        finally:
            aclose = getattr(values, "aclose", None)
            if aclose is not None:
                await aclose()
            self._done = True
            self._changed.set()

    async def _listen(self, box: Mailbox) -> None:
        while not self._stopped:
            message = await box.next()
            # None: the bus was away, and parts with it. Headers: the server's "no responders".
            self._stopped = message is None or message.data == wire.STOP or bool(message.headers)
            self._acknowledged += 1
            self._changed.set()

    async def _send_parts(self, box: Mailbox) -> None:
        number = 0
        while True:
            if self._stopped:
                raise Stopped
            free = number - self._acknowledged < wire.WINDOW
            if free and (self._buffer or self._done):
                part = bytes(self._buffer[: self._size])
                del self._buffer[: len(part)]
                self._emptied.set()
                last = self._done and not self._buffer
                number += 1
                headers = {wire.PART: str(number)}
                if last:
                    headers |= {wire.END: str(number)} | self._end_headers
                    if self._error is not None:
                        headers |= wire.error_headers(self._error)
                await self._publish(part, box, headers)
                if last:
                    return
                # Let the acknowledgements in, and the producer pile up the next part.
                await asyncio.sleep(0)
                continue
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wire.PART_IDLE_SECONDS / 3):
                    await self._changed.wait()
                    continue
            # Part 0 is nothing to take or to acknowledge: it says that we are here, and asks whether the receiver is.
            await self._publish(b"", box, {wire.PART: "0"})

    async def _publish(self, part: bytes, box: Mailbox, headers: dict[str, str]) -> None:
        await self._mux.connection.publish(self._reply, part, box.subject, headers)


async def single(value: bytes) -> AsyncIterator[bytes]:
    """One value too large for a message, as a sequence."""
    yield value
