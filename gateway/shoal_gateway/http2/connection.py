"""One client's HTTP/2 connection: frames in and out, flow control, and the calls on it (RFC 9113)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol, cast

import structlog
from hpack import Decoder, HPACKError, OversizedHeaderListError
from shoal_bus.errors import Code

from shoal_gateway.http2 import frames, grpc_wire
from shoal_gateway.http2.frames import ErrorCode, Flag, Kind, ProtocolError, Setting, frame
from shoal_gateway.http2.stream import WINDOW, Stream

log = structlog.get_logger(__name__)

LARGEST_HEADERS = 64 << 10
_LARGEST_FRAME = 64 << 10
"""Of what is sent to us, and of what we send: others' turn comes between two."""
_WINDOW = 64 << 20
"""Of the connection; what bounds memory are the streams' own."""
_FIRST_WINDOW = 65535
"""Before anybody has said anything (RFC 9113, 6.9.2)."""
_AT_ONCE = 512 << 10
"""Bytes of one write."""
_KEPT_HEADS = 256
GRPC_GO_S = bytes((2, 4, 16, 16, 9, 14, 7, 7))
"""The payload of the PINGs by which grpc-go estimates a connection's bandwidth."""
_PONG_SECONDS = 0.01
_UNDO_SECONDS = 2.0


class Method(Protocol):
    """What serves the calls of one path."""

    takes_many: bool
    """Its client streams messages: it begins with the first, and not when all are there."""

    async def serve(self, stream: Stream) -> None:
        """Answers a call, whatever happens; cancelled when its client is gone."""


class Connection(asyncio.Protocol):
    """One client. `methods` are by their paths; `others` has every connection while it is there."""

    def __init__(self, methods: Mapping[str, Method], others: set[Connection]) -> None:
        self._methods, self._others = methods, others
        self._rest = b""
        self._greeted = self._paused = self._leaving = False
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._decoder = Decoder(LARGEST_HEADERS)
        self._heads: dict[bytes, grpc_wire.Head | None] = {}
        self._block: tuple[int, int, bytes] | None = None
        """Stream, flags and beginning of headers that go on in the next frame."""
        self._window, self._first_window, self._largest_frame = _FIRST_WINDOW, _FIRST_WINDOW, frames.SMALLEST_FRAME
        self._untold = 0
        self._pong_due = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---------------------------------------------------------------------------------------------------------- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._others.add(self)
        ours = {
            Setting.INITIAL_WINDOW_SIZE: WINDOW,
            Setting.MAX_FRAME_SIZE: _LARGEST_FRAME,
            Setting.MAX_HEADER_LIST_SIZE: LARGEST_HEADERS,
        }
        self.write(frames.settings(ours) + frames.window_update(0, _WINDOW - _FIRST_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)
        for stream in list(self._streams.values()):
            stream.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        try:
            self._take(self._rest + data if self._rest else data)
        except ProtocolError as error:
            log.warning("http2.refused", error=str(error), code=error.code.name)
            self.write(frames.goaway(self._last, error.code, str(error)))
            self._transport.close()

    # ------------------------------------------------------------------------------------------------------------- read

    def _take(self, data: bytes) -> None:
        at = 0
        if not self._greeted:
            if not data.startswith(frames.PREFACE[: len(data)]):
                raise ProtocolError("this is no HTTP/2")
            if len(data) < len(frames.PREFACE):
                self._rest = data
                return
            self._greeted, at = True, len(frames.PREFACE)
        while len(data) - at >= frames.HEAD.size:
            head, flags, id = frames.HEAD.unpack_from(data, at)
            length, begin = head >> 8, at + frames.HEAD.size
            if length > _LARGEST_FRAME:
                raise ProtocolError(f"a frame of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
            if len(data) < begin + length:
                break
            at = begin + length
            self._frame(head & 0xFF, flags, id & frames.LARGEST_WINDOW, data[begin:at])
        self._rest = data[at:]

    def _frame(self, kind: int, flags: int, id: int, payload: bytes) -> None:
        if self._block is not None and (kind != Kind.CONTINUATION or id != self._block[0]):
            raise ProtocolError("headers that don't go on")
        if kind == Kind.DATA:
            self._data(flags, id, payload)
        elif kind == Kind.HEADERS:
            block = frames.unpadded(flags, payload)
            self._headers(id, flags, block[5:] if flags & Flag.PRIORITY else block)
        elif kind == Kind.CONTINUATION:
            if self._block is None:
                raise ProtocolError("headers that go on without having begun")
            _, began, block = self._block
            self._headers(id, began | (flags & Flag.END_HEADERS), block + payload)
        elif kind == Kind.WINDOW_UPDATE:
            self._allowed(id, frames.number(payload) & frames.LARGEST_WINDOW)
        elif kind == Kind.RST_STREAM:
            frames.number(payload)
            self._known(id)
            if id in self._streams:
                self._streams[id].cancel()
        elif kind == Kind.SETTINGS:
            self._settings(flags, payload)
        elif kind == Kind.PING:
            if len(payload) != 8:
                raise ProtocolError("PING: a length that isn't 8", ErrorCode.FRAME_SIZE_ERROR)
            if not flags & Flag.ACK:
                self._ping(payload)
        elif kind == Kind.PUSH_PROMISE:
            raise ProtocolError("a client that pushes")

    def _ping(self, payload: bytes) -> None:
        """Answers at once (RFC 9113, 6.7), but for what grpc-go sends with every answer that it reads.

        It sends no other before that one is answered, and waits for nothing: that is answered a moment later.
        """
        if payload != GRPC_GO_S:
            self.write(frame(Kind.PING, Flag.ACK, 0, payload))
        elif not self._pong_due:
            self._pong_due = True
            asyncio.get_running_loop().call_later(_PONG_SECONDS, self._pong)

    def _pong(self) -> None:
        self._pong_due = False
        if not self._transport.is_closing():
            self.write(frame(Kind.PING, Flag.ACK, 0, GRPC_GO_S))

    def _known(self, id: int) -> None:
        """A stream that is, or was."""
        if not id or id > self._last:
            raise ProtocolError(f"stream {id}: hasn't begun")

    def _data(self, flags: int, id: int, payload: bytes) -> None:
        self._known(id)
        self._untold += len(payload)
        if self._untold > _WINDOW // 2:
            self.allow(0, self._untold)
            self._untold = 0
        stream = self._streams.get(id)
        if stream is not None:
            stream.take(frames.unpadded(flags, payload), len(payload), last=bool(flags & Flag.END_STREAM))

    def _headers(self, id: int, flags: int, block: bytes) -> None:
        if len(block) > LARGEST_HEADERS:
            raise ProtocolError("headers that are too large", ErrorCode.ENHANCE_YOUR_CALM)
        if not flags & Flag.END_HEADERS:
            self._block = (id, flags, block)
            return
        self._block = None
        head = self._head(block)
        if id <= self._last:  # a client's trailers, of which gRPC has none to say anything
            if not flags & Flag.END_STREAM:
                raise ProtocolError(f"stream {id}: begins twice")
            if id in self._streams:
                self._streams[id].take_end()
            return
        if not id % 2:
            raise ProtocolError(f"stream {id}: isn't a client's")
        if self._leaving:
            self.write(frames.reset(id, ErrorCode.REFUSED_STREAM))
            return
        self._last = id
        self._begin(id, head, ended=bool(flags & Flag.END_STREAM))

    def _begin(self, id: int, head: grpc_wire.Head | None, *, ended: bool) -> None:
        if head is None:
            self.write(frames.reset(id, ErrorCode.PROTOCOL_ERROR))
            return
        method = self._methods.get(head.path)
        if method is None:
            told = grpc_wire.trailers(Code.UNIMPLEMENTED, _unknown(head.path, self._methods))
            block = grpc_wire.HEADERS + told
            self.write(frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, id, block))
            if not ended:
                self.write(frames.reset(id, ErrorCode.NO_ERROR))
            return
        stream = self._streams[id] = Stream(self, id, head, method, self._first_window)
        if ended:
            stream.take_end()

    def _head(self, block: bytes) -> grpc_wire.Head | None:
        """A call's head. Most come as before, from the table that both sides keep: what they said then is kept, too."""
        if block in self._heads:
            return self._heads[block]
        before = self._table()
        try:
            head = grpc_wire.head_of(cast("list[tuple[str, str]]", self._decoder.decode(block)))
        except OversizedHeaderListError:
            raise ProtocolError("headers that are too large", ErrorCode.ENHANCE_YOUR_CALM) from None
        except (HPACKError, UnicodeDecodeError) as error:
            raise ProtocolError(f"headers: {error}", ErrorCode.COMPRESSION_ERROR) from None
        after = self._table()
        if before != after or len(self._heads) == _KEPT_HEADS:
            self._heads.clear()
        if before == after:
            self._heads[block] = head
        return head

    def _table(self) -> tuple[int, int, int]:
        """What is another after each change of the table that both sides keep."""
        entries = self._decoder.header_table.dynamic_entries
        return self._decoder.header_table.maxsize, len(entries), id(entries[0]) if entries else 0

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & Flag.ACK:
            return
        told = frames.told_settings(payload)
        if Setting.INITIAL_WINDOW_SIZE in told:
            more = told[Setting.INITIAL_WINDOW_SIZE] - self._first_window
            self._first_window += more
            for stream in self._streams.values():
                stream.window += more
        self._largest_frame = min(told.get(Setting.MAX_FRAME_SIZE, self._largest_frame), _LARGEST_FRAME)
        self.write(frame(Kind.SETTINGS, Flag.ACK, 0))
        self._wake()

    def _allowed(self, id: int, more: int) -> None:
        if id:
            self._known(id)
        stream = self._streams.get(id)
        window = stream.window if stream is not None else self._window
        if not more or (window + more > frames.LARGEST_WINDOW and (stream is not None or not id)):
            raise ProtocolError("WINDOW_UPDATE: of nothing, or too much", ErrorCode.FLOW_CONTROL_ERROR)
        if stream is not None:
            stream.window += more
            stream.wake()
        elif not id:
            self._window += more
            self._wake()

    def _wake(self) -> None:
        for stream in self._streams.values():
            stream.wake()

    # ------------------------------------------------------------------------------------------------ for the streams

    def write(self, data: bytes) -> None:
        """Sends frames that aren't under flow control."""
        self._transport.write(data)

    def has_room(self, stream: Stream, size: int) -> bool:
        """Whether so many bytes may be sent at once, in one frame."""
        return not self._paused and size <= min(self._window, stream.window, self._largest_frame)

    def spend(self, stream: Stream, size: int) -> None:
        """So many bytes are being sent."""
        self._window -= size
        stream.window -= size

    def send(self, stream: Stream, data: memoryview) -> int:
        """Sends as much of it as the client takes for now; how much that is."""
        room = 0 if self._paused else max(0, min(self._window, stream.window, len(data), _AT_ONCE))
        if room:
            pieces: list[bytes | memoryview] = []
            for at in range(0, room, self._largest_frame):
                piece = data[at : min(at + self._largest_frame, room)]
                pieces += (frames.HEAD.pack(len(piece) << 8 | Kind.DATA, 0, stream.id), piece)
            self.spend(stream, room)
            self.write(b"".join(pieces))
        return room

    def allow(self, id: int, more: int) -> None:
        """The client may send so many more bytes on a stream, or, for 0, in all."""
        self.write(frames.window_update(id, more))

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Breaks a stream off."""
        self.write(frames.reset(stream.id, code))
        stream.cancel()

    def serve(self, method: Method, stream: Stream) -> asyncio.Task[None]:
        """Begins to serve a call."""
        task = asyncio.get_running_loop().create_task(self._serve(method, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, method: Method, stream: Stream) -> None:
        # What its client has given up before isn't to be in its way. grpc's own tells that a little after the new call.
        if undoing := {task for task in self._tasks if task.cancelling()}:
            await asyncio.wait(undoing, timeout=_UNDO_SECONDS)
        try:
            await method.serve(stream)
        except Exception:
            log.exception("http2.failed")
            stream.refuse(Code.INTERNAL, "internal error")

    def forget(self, stream: Stream, *, unread: bool) -> None:
        """A stream is over; `unread`: its client needn't go on sending."""
        self._streams.pop(stream.id, None)
        if unread:
            self.write(frames.reset(stream.id, ErrorCode.NO_ERROR))

    # ------------------------------------------------------------------------------------------------------------- stop

    def leave(self) -> None:
        """Takes no further calls; those under way go on."""
        if not self._leaving:
            self._leaving = True
            self.write(frames.goaway(self._last, ErrorCode.NO_ERROR))

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The calls under way."""
        return self._tasks

    def close(self) -> None:
        """Ends it, with every call on it."""
        for task in self._tasks:
            task.cancel()
        self._transport.close()


def _unknown(path: str, methods: Mapping[str, Method]) -> str:
    """What there isn't, in grpc-go's words."""
    service, _, method = path.lstrip("/").rpartition("/")
    if any(known.startswith(f"/{service}/") for known in methods):
        return f"unknown method {method} for service {service}"
    return f"unknown service {service}"
