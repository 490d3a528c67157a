"""What a connection reads, parsed as it comes: no buffer, no task that is woken for it."""

from __future__ import annotations

import asyncio
from typing import Any

import nats.errors

from shoal_bus.framing import Parser


class Receiver(asyncio.Protocol):
    """Takes the place of a stream's protocol, which it still tells of all but the data."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._before: asyncio.BaseProtocol = asyncio.Protocol()
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Why there will be no more."""

    async def take_over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From here on. What has come already is handled before this returns."""
        transport: Any = writer.transport
        self._before = transport.get_protocol()
        transport.set_protocol(self)
        if reader.at_eof():
            self._end(None)
            return
        reader.feed_eof()  # of what it has: nothing comes to it any more
        rest = await reader.read()
        if rest:
            self.data_received(rest)
        if transport.is_closing():
            self._end(None)

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        parsing = self._parser.parse(data)
        try:
            parsing.send(None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 (whoever waits for the end is told)
            self._end(error)
            return
        # What is called for a message isn't to wait: the next one would overtake it.
        parsing.close()
        self._end(RuntimeError("waited while reading"))

    def eof_received(self) -> None:
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)
        self._before.connection_lost(exc)

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error or nats.errors.UnexpectedEOF())
