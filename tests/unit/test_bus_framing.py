"""NATS's protocol as we read and write it: cut anywhere, and compared with nats-py's own."""

from __future__ import annotations

import random
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.errors import BadHeaderError, ProtocolError
from nats.protocol.parser import Parser as NatsParser
from shoal_bus.framing import Parser, plain_headers, pub

SENT = (
    b'INFO {"server_id":"x","max_payload":1048576} \r\n'
    b"MSG a.b 1 0\r\n\r\n"
    b"+OK\r\n"
    b"MSG a.b 12 _INBOX.x.1 11\r\nhello\r\nMSG \r\n"
    b"PING\r\n"
    b"HMSG c 3 27 33\r\nNATS/1.0\r\nA: 1\r\nB: x: y\r\n\r\nMSG \r\n\r\n"
    b"HMSG c 3 reply 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"PONG\r\n"
    b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n"
    b"MSG a\t7  5\r\n12345\r\n"
)


class Heard:
    """What a parser calls, written down."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.all.append((sid, subject, reply, data, headers or b""))

    async def _process_ping(self) -> None:
        self.all.append("PING")

    async def _process_pong(self) -> None:
        self.all.append("PONG")

    async def _process_err(self, text: str) -> None:
        self.all.append(text.strip("'"))

    async def _process_info(self, info: Any) -> None:
        self.all.append(info)


async def heard(data: bytes, cuts: list[int], parser: type[Any] = Parser) -> list[Any]:
    nc = Heard()
    one = parser(nc)
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        await one.parse(data[begin:end])
    return nc.all


async def test_what_the_server_sends_is_read_as_nats_py_reads_it() -> None:
    expected = await heard(SENT, [], NatsParser)
    assert len(expected) == 9
    assert await heard(SENT, []) == expected


async def test_messages_may_be_cut_anywhere() -> None:
    expected = await heard(SENT, [])
    for cut in range(1, len(SENT)):
        assert await heard(SENT, [cut]) == expected
    assert await heard(SENT, list(range(1, len(SENT)))) == expected
    chance = random.Random(7)
    for _ in range(200):
        cuts = sorted(chance.sample(range(1, len(SENT)), chance.randint(2, 12)))
        assert await heard(SENT, cuts) == expected


@pytest.mark.parametrize(
    "line", [b"MSG a\r\n", b"MSG a b 1\r\n", b"HMSG a 1 2 x\r\n", b"WHAT\r\n", b"\r\n", b"x" * 99_999]
)
async def test_what_is_no_protocol_ends_the_connection(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        await heard(b"PING\r\n" + line, [])


@pytest.mark.parametrize(
    "headers",
    [{}, {"A": "1"}, {"Nats-Msg-Id": " x.y.1 ", "B": ""}, {"A": "two\r\nPUB x 0\r\nlines"}, {"Ä": "x"}, {"A": "ä✓\t"}],
)
async def test_headers_are_written_and_read_as_nats_py_does(headers: dict[str, str]) -> None:
    if not all(map(str.isascii, headers)):
        with pytest.raises(BadHeaderError):
            pub("s", "", b"", headers)
        return
    first, _, rest = pub("s", "r", b"data", headers).partition(b"\r\n")
    operation, subject, reply, *sizes = first.split()
    assert (operation, subject, reply) == (b"HPUB", b"s", b"r")
    block, payload = rest[: int(sizes[0])], rest[int(sizes[0]) : int(sizes[1])]
    assert (payload, rest[int(sizes[1]) :]) == (b"data", b"\r\n")
    assert b"\r\nPUB" not in block
    assert (plain_headers(block) or None) == await Nats()._process_headers(block)


def test_a_status_of_the_servers_is_left_to_nats_py() -> None:
    assert plain_headers(b"NATS/1.0 503\r\n\r\n") is None
    assert plain_headers(b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1\r\n\r\n") is None


def test_a_message_without_headers() -> None:
    assert pub("a.b", "", b"x", None) == b"PUB a.b  1\r\nx\r\n"
