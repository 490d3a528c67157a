"""gRPC over HTTP/2, by a client that writes its own frames, and by grpc's."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import hpack
import pytest
from shoal_bus.errors import Code
from shoal_gateway.http2 import frames, grpc_wire
from shoal_gateway.http2.connection import GRPC_GO_S, LARGEST_HEADERS
from shoal_gateway.http2.frames import ErrorCode, Flag, Kind, Setting, frame
from shoal_gateway.http2.server import listening
from shoal_gateway.http2.stream import WINDOW, Stream

ECHO, MANY, SLOW = "/test.Echo/Echo", "/test.Echo/Many", "/test.Echo/Slow"
HEADERS = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), ("content-type", "application/grpc")]

OF_A_KIND_NOBODY_KNOWS = frames.HEAD.pack(3 << 8 | 0x77, 0, 1) + bytes(3)
TOO_LONG = frame(Kind.HEADERS, 0, 1, bytes(60000)) + frame(Kind.CONTINUATION, 0, 1, bytes(LARGEST_HEADERS - 59999))


class Echo:
    takes_many = False

    async def serve(self, stream: Stream) -> None:
        await stream.respond(stream.only())


class Many:
    """Each message, and at a `!` an error."""

    takes_many = True

    async def serve(self, stream: Stream) -> None:
        async for message in stream.messages():
            if message == b"!":
                stream.refuse(Code.ABORTED, "50% é\n")
                return
            await stream.write(message)
        stream.end()


class Slow:
    takes_many = False

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

    async def serve(self, stream: Stream) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Raw:
    """A client of frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.encoder, self.decoder = reader, writer, hpack.Encoder(), hpack.Decoder()

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    def headers(self, id: int, path: str, *more: tuple[str, str], flags: int = Flag.END_HEADERS) -> bytes:
        return frame(Kind.HEADERS, flags, id, self.encoder.encode([*HEADERS, (":path", path), *more]))

    async def next(self, *kinds: Kind) -> tuple[Kind, int, int, bytes]:
        """The next frame that is of one of these kinds."""
        while True:
            head, flags, id = frames.HEAD.unpack(await self.reader.readexactly(frames.HEAD.size))
            payload = await self.reader.readexactly(head >> 8)
            if Kind(head & 0xFF) in kinds:
                return Kind(head & 0xFF), flags, id, payload

    async def told(self, id: int) -> dict[str, str]:
        """A call's trailers."""
        while True:
            _, flags, of, block = await self.next(Kind.HEADERS)
            found = dict(self.decoder.decode(block))
            if flags & Flag.END_STREAM and of == id:
                return {str(name): str(value) for name, value in found.items()}

    async def ended(self) -> ErrorCode:
        """Why the connection is closed."""
        _, _, _, payload = await self.next(Kind.GOAWAY)
        assert await self.reader.read() == b""
        return ErrorCode(struct.unpack(">II", payload[:8])[1])


def message(data: bytes) -> bytes:
    return grpc_wire.PREFIX.pack(0, len(data)) + data


def data(id: int, payload: bytes, *, last: bool = True) -> bytes:
    return frame(Kind.DATA, Flag.END_STREAM if last else 0, id, payload)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
async def socket(tmp_path: Path, slow: Slow) -> AsyncIterator[Path]:
    path = tmp_path / "s"
    async with listening(str(path), {ECHO: Echo(), MANY: Many(), SLOW: slow}) as server:
        yield path
        await server.stop(0.1)


@asynccontextmanager
async def raw(path: Path, *, first: bytes = frames.PREFACE + frames.settings({})) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(first)
    try:
        async with asyncio.timeout(10):
            yield Raw(reader, writer)
    finally:
        writer.close()


@pytest.mark.parametrize("size", [0, 1, 16379, 16380, 70_000, 5 << 20])
async def test_grpcs_own_client_gets_back_what_it_sends(socket: Path, size: int) -> None:
    async with grpc.aio.insecure_channel(
        f"unix:{socket}", options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        assert await channel.unary_unary(ECHO)(bytes(size), timeout=20) == bytes(size)
        call = channel.stream_stream(MANY)(timeout=20)
        for _ in range(3):
            await call.write(bytes(size))
            assert await call.read() == bytes(size)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_an_error_has_its_code_and_its_words(socket: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        for sent in ([b"!"], [b"x", b"!"]):
            call = channel.stream_stream(MANY)(iter(sent))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [one async for one in call]
            assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.ABORTED, "50% é\n")
        for path, words in (
            ("/test.Echo/No", "unknown method No for service test.Echo"),
            ("/no/No", "unknown service no"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(path)(b"")
            assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.UNIMPLEMENTED, words)


async def test_a_deadline_and_a_client_that_goes_cancel_a_call(socket: Path, slow: Slow) -> None:
    async with raw(socket) as client:
        client.send(client.headers(1, SLOW, ("grpc-timeout", "50m")), data(1, message(b"")))
        assert (await client.told(1))["grpc-status"] == str(int(Code.DEADLINE_EXCEEDED))
        await slow.cancelled.wait()
    for how in (frames.reset(1, ErrorCode.CANCEL), None):
        slow.begun.clear()
        slow.cancelled.clear()
        async with raw(socket) as client:
            client.send(client.headers(1, SLOW), data(1, message(b"")))
            await slow.begun.wait()
            if how is None:
                client.writer.close()
            else:
                client.send(how)
            await slow.cancelled.wait()


async def test_what_comes_bit_by_bit_padded_and_in_pieces_is_put_together(socket: Path) -> None:
    async with raw(socket, first=b"") as client:
        block = client.encoder.encode([*HEADERS, (":path", MANY)])
        padded = frame(Kind.HEADERS, Flag.PADDED | Flag.PRIORITY, 1, b"\x02" + bytes(5) + block[:3] + bytes(2))
        sent = frames.PREFACE + frames.settings({}) + padded
        sent += frame(Kind.CONTINUATION, 0, 1, block[3:9]) + frame(Kind.CONTINUATION, Flag.END_HEADERS, 1, block[9:])
        sent += frame(Kind(2), 0, 1, bytes(5)) + OF_A_KIND_NOBODY_KNOWS
        two = message(b"one") + message(b"")
        sent += frame(Kind.DATA, Flag.PADDED, 1, b"\x03" + two[:4] + bytes(3))
        sent += data(1, two[4:10], last=False) + data(1, two[10:])
        for at in range(len(sent)):
            client.send(sent[at : at + 1])
            await asyncio.sleep(0)
        assert [(await client.next(Kind.DATA))[3] for _ in range(2)] == [message(b"one"), message(b"")]
        assert (await client.told(1))["grpc-status"] == "0"


async def test_no_more_is_sent_than_the_client_takes(socket: Path) -> None:
    async with raw(socket, first=frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 10})) as client:
        client.send(client.headers(1, ECHO), data(1, message(b"x" * 20)))
        assert len((await client.next(Kind.DATA))[3]) == 10
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.next(Kind.DATA, Kind.HEADERS)
        client.send(frames.window_update(1, 5))
        assert len((await client.next(Kind.DATA))[3]) == 5
        client.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 1000}))
        assert len((await client.next(Kind.DATA))[3]) == 10
        assert (await client.told(1))["grpc-status"] == "0"


async def test_a_client_may_send_more_as_it_is_taken_and_no_more_than_that(socket: Path, slow: Slow) -> None:
    async with raw(socket) as client:
        piece = message(bytes((1 << 14) - 5))
        client.send(client.headers(1, MANY))
        for _ in range(3 * WINDOW // len(piece)):
            client.send(
                data(1, piece, last=False), frames.window_update(1, len(piece)), frames.window_update(0, len(piece))
            )
            await client.next(Kind.DATA)
        client.send(client.headers(3, SLOW))  # whose messages nobody takes
        for _ in range(WINDOW // len(piece) + 1):
            client.send(data(3, piece, last=False))
        _, _, id, payload = await client.next(Kind.RST_STREAM)
        assert (id, frames.number(payload)) == (3, ErrorCode.FLOW_CONTROL_ERROR)


async def test_a_message_too_large_or_compressed_is_refused(socket: Path) -> None:
    async with raw(socket) as client:
        for id, prefix, code in (
            (1, grpc_wire.PREFIX.pack(0, grpc_wire.LARGEST_MESSAGE + 1), Code.RESOURCE_EXHAUSTED),
            (3, grpc_wire.PREFIX.pack(1, 4), Code.UNIMPLEMENTED),
        ):
            client.send(client.headers(id, MANY), data(id, prefix, last=False))
            assert (await client.told(id))["grpc-status"] == str(int(code))
        client.send(client.headers(5, ECHO), data(5, b""))
        assert (await client.told(5))["grpc-status"] == str(int(Code.INTERNAL))
        pings = [GRPC_GO_S, b"00000001", b"00000002"]
        client.send(*(frame(Kind.PING, 0, 0, payload) for payload in pings))
        answers = [(await client.next(Kind.PING))[1:] for _ in pings]
        assert answers == [(Flag.ACK, 0, payload) for payload in (*pings[1:], pings[0])]
        client.send(frame(Kind.PING, 0, 0, GRPC_GO_S))
        assert (await client.next(Kind.PING))[1:] == (Flag.ACK, 0, GRPC_GO_S)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (data(1, b""), ErrorCode.PROTOCOL_ERROR),
        (frame(Kind.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
        (frame(Kind.HEADERS, 0, 1, b"") + frames.settings({}), ErrorCode.PROTOCOL_ERROR),
        (frame(Kind.CONTINUATION, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (frame(Kind.SETTINGS, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(Kind.PING, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.settings({Setting.MAX_FRAME_SIZE: 1}), ErrorCode.PROTOCOL_ERROR),
        (frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.window_update(0, 0), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(Kind.PUSH_PROMISE, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (frame(Kind.DATA, Flag.PADDED, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (frames.HEAD.pack((1 << 20) << 8, 0, 1), ErrorCode.FRAME_SIZE_ERROR),
        (TOO_LONG, ErrorCode.ENHANCE_YOUR_CALM),
    ],
)  # fmt: skip
async def test_a_client_that_breaks_the_protocol_is_told_how(socket: Path, sent: bytes, code: ErrorCode) -> None:
    async with raw(socket) as client:
        client.send(sent)
        assert await client.ended() is code


async def test_what_isnt_http2_is_closed(socket: Path) -> None:
    async with raw(socket, first=b"GET / HTTP/1.1\r\n\r\n") as client:
        assert await client.ended() is ErrorCode.PROTOCOL_ERROR


async def test_headers_are_understood_however_the_table_changes(socket: Path) -> None:
    async with raw(socket) as client:
        for turn in range(400):
            id = 2 * turn + 1
            # The same, and now and then what pushes the rest out of the table that both sides keep.
            more = [("x-more", f"{turn}" * 900)] if turn % 7 == 0 else []
            client.send(client.headers(id, ECHO, *more), data(id, message(b"%d" % turn)))
            assert (await client.next(Kind.DATA))[3] == message(b"%d" % turn)


async def test_a_server_that_stops_ends_what_is_under_way_and_begins_nothing(tmp_path: Path) -> None:
    slow = Slow()
    async with listening(str(tmp_path / "s"), {ECHO: Echo(), SLOW: slow}) as server, raw(tmp_path / "s") as client:
        client.send(client.headers(1, SLOW), data(1, message(b"")))
        await slow.begun.wait()
        stopping = asyncio.create_task(server.stop(0.3))
        await client.next(Kind.GOAWAY)
        client.send(client.headers(3, ECHO), data(3, message(b"")))
        assert (await client.next(Kind.RST_STREAM))[2:] == (3, ErrorCode.REFUSED_STREAM.to_bytes(4, "big"))
        await stopping
        assert slow.cancelled.is_set()
