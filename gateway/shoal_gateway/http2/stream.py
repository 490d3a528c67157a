"""One call: its messages as they come, and its answer."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from shoal_bus.errors import Code, DeadlineExceeded, ShoalError

from shoal_gateway.http2 import grpc_wire
from shoal_gateway.http2.frames import ErrorCode, Flag, Kind, frame

if TYPE_CHECKING:
    from shoal_gateway.http2.connection import Connection, Method

WINDOW = 4 << 20
"""Bytes that a client may send before somebody has taken them."""
_MOST_HELD = 32 << 10


class Stream:
    """A call under way. Everything is sent by the one task that serves it, so nothing overtakes anything."""

    def __init__(self, connection: Connection, id: int, head: grpc_wire.Head, method: Method, window: int) -> None:
        self._connection, self.id, self._method = connection, id, method
        self.metadata = head.metadata
        self.window = window
        """Bytes that the client takes for now."""
        self._messages = grpc_wire.Messages()
        self._arrived: deque[bytes] = deque()
        self._untold = 0
        """Bytes that have come, and that the client doesn't know to be taken."""
        self._all_here = self._opened = self._closed = False
        self._held = b""
        """Frames that go with the next ones, if these come at once."""
        self._wake: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._ends: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout is not None:
            self._ends = time.monotonic() + head.timeout
            self._timer = asyncio.get_running_loop().call_later(head.timeout, self._expire)

    def time_remaining(self) -> float | None:
        """Seconds the client still waits, where it said so."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    # -------------------------------------------------------------------------------------------------- what has come

    def take(self, data: bytes, size: int, *, last: bool) -> None:
        """Data, in a frame of so many bytes."""
        self._untold += size
        if self._untold > WINDOW:
            self._connection.reset(self, ErrorCode.FLOW_CONTROL_ERROR)
            return
        try:
            self._arrived.extend(self._messages.take(data))
        except ShoalError as error:
            self.refuse(error.code, str(error))
            self.cancel()
            return
        if last:
            self.take_end()
            return
        if not self._arrived:
            self._tell()
        elif self._method.takes_many:
            self._serve()
        self._notify()

    def take_end(self) -> None:
        """No more comes."""
        self._all_here = True
        if not self._method.takes_many and len(self._arrived) != 1:
            self.refuse(Code.INTERNAL, f"grpc: a call with one message has {len(self._arrived)}")
            return
        self._serve()
        self._notify()

    def only(self) -> bytes:
        """The one message of a call that has one."""
        return self._arrived.popleft()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """All messages, as they come. For one reader."""
        while True:
            while self._arrived:
                message = self._arrived.popleft()
                if not self._arrived:
                    self._tell()
                yield message
            if self._all_here:
                return
            await self._woken()

    def _tell(self) -> None:
        if self._untold > WINDOW // 2 and not self._all_here and not self._closed:
            self._connection.allow(self.id, self._untold)
            self._untold = 0

    # ------------------------------------------------------------------------------------------------- what is answered

    async def respond(self, message: bytes) -> None:
        """The one message of a call that is over with it."""
        data = grpc_wire.PREFIX.pack(0, len(message)) + message
        if not self._closed and self._connection.has_room(self, len(data)):
            self._connection.spend(self, len(data))
            self._connection.write(
                self._headers() + frame(Kind.DATA, 0, self.id, data) + self._trailers(grpc_wire.OK)
            )  # one write, whose end the client has with its beginning
            self._close()
            return
        await self.write(message)
        self.end()

    async def write(self, message: bytes) -> None:
        """One message of several. Waits for a client that takes no more for now."""
        whole = grpc_wire.PREFIX.pack(0, len(message)) + message
        if not self._closed and self._connection.has_room(self, len(whole)):
            self._connection.spend(self, len(whole))
            self._hold((b"" if self._opened else self._headers()) + frame(Kind.DATA, 0, self.id, whole))
            return
        self._release()
        if not self._opened and not self._closed:
            self._connection.write(self._headers())
        data = memoryview(whole)
        while data and not self._closed:
            sent = self._connection.send(self, data)
            data = data[sent:]
            if not sent:
                await self._woken()

    def end(self) -> None:
        """Ends it as one that went well."""
        if not self._closed:
            self._send((b"" if self._opened else self._headers()) + self._trailers(grpc_wire.OK))
            self._close()

    def refuse(self, code: Code, message: str) -> None:
        """Ends it as one that didn't."""
        if not self._closed:
            told = grpc_wire.trailers(code, message)
            self._send(self._trailers(told if self._opened else grpc_wire.HEADERS + told))
            self._close()

    def _hold(self, frames: bytes) -> None:
        """Sends frames in the loop's next turn at the latest: most streams end with their first message."""
        if len(self._held) > _MOST_HELD:
            self._release()
        if not self._held:
            asyncio.get_running_loop().call_soon(self._release)
        self._held += frames

    def _release(self) -> None:
        if self._held:
            self._send(b"")

    def _send(self, frames: bytes) -> None:
        held, self._held = self._held, b""
        self._connection.write(held + frames)

    def _headers(self) -> bytes:
        self._opened = True
        return frame(Kind.HEADERS, Flag.END_HEADERS, self.id, grpc_wire.HEADERS)

    def _trailers(self, block: bytes) -> bytes:
        return frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, self.id, block)

    # ----------------------------------------------------------------------------------------------------- its own life

    def wake(self) -> None:
        """There may be room for what couldn't be sent."""
        self._notify()

    def cancel(self) -> None:
        """It is over, whatever is under way for it."""
        self._held = b""
        self._close(told=True)
        if self._task is not None:
            self._task.cancel()

    def _serve(self) -> None:
        # Not before there is something to look at: what its client has given up before it is known by then.
        if self._task is None and not self._closed:
            self._task = self._connection.serve(self._method, self)

    def _expire(self) -> None:
        error = DeadlineExceeded("context deadline exceeded")
        self.refuse(error.code, str(error))
        self.cancel()

    def _close(self, *, told: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._connection.forget(self, unread=not self._all_here and not told)

    async def _woken(self) -> None:
        # For the one who waits: a task that sends doesn't wait for messages at the same time, unless two share a call.
        if self._wake is None or self._wake.done():
            self._wake = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._wake)

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
