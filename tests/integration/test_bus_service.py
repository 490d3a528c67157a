"""A service and its clients on a real nats-server: answers, refusals, parts, bounds, and a server that goes away."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from shoal_bus import subjects, wire
from shoal_bus.client import Client
from shoal_bus.connection import Address, Connection, connect
from shoal_bus.consumer import read_events
from shoal_bus.context import Context
from shoal_bus.database import Database
from shoal_bus.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from shoal_bus.harness import Service
from shoal_bus.locks import Locks
from shoal_bus.message import Empty, pack
from shoal_bus.verb import Verb, behaves

from tests.support import bus_service as demo
from tests.support.bus_service import Get, Item, ListItems, Put, Thing
from tests.support.natsd import NatsServer, free_port


class Running:
    """A service in this process, and a client of its own connection."""

    def __init__(self, service: Service, client: Client, database: Database) -> None:
        self.service, self.client, self.database = service, client, database
        self.begun: list[str] = []
        self.ended: list[str] = []


@asynccontextmanager
async def running(server: NatsServer, tmp_path: Path, *, node: str = "n1", bound: int = 8) -> AsyncIterator[Running]:
    ours, theirs = await connect(server.address, name="service"), await connect(server.address, name="client")
    database, locks = Database(tmp_path / node / "db", node), Locks(tmp_path / node / "locks")
    service = Service("demo", ours, node=node, database=database, locks=locks, bound=bound)
    run = Running(service, Client(theirs, node), database)

    async def get(context: Context, request: Get) -> Item:
        if request.name == "gone":
            raise NotFound("item gone: not found", hint="put it first")
        if request.name == "bug":
            raise RuntimeError("a secret of ours")
        if request.name.startswith("slow"):
            run.begun.append(request.name)
            await asyncio.sleep(0.5)
        return Item(name=request.name)

    async def big(_: Context, request: Get) -> Item:
        return Item(name="x" * int(request.name))

    async def wait(_: Context, request: Get) -> Item:
        await asyncio.sleep(3600)
        raise AssertionError

    async def things(_: Context, request: ListItems) -> AsyncIterator[Thing]:
        try:
            for number in range(request.count):
                await asyncio.sleep(request.pause)
                yield Thing(number=number, body="x" * request.size)
            if request.size == 1:
                raise NotFound("the rest: not found")
        finally:
            run.ended.append("list")

    async def nest(context: Context, request: Get) -> Empty:
        if int(request.name):
            await context.client.call(demo.ITEM_NEST, Get(name=str(int(request.name) - 1)))
        return Empty()

    async def put(context: Context, request: Put) -> Item:
        run.begun.append(request.name)
        await asyncio.sleep(request.seconds)
        return Item(name=request.name)

    service.handle(demo.ITEM_GET, get)
    service.handle(BIG, big)
    service.handle(demo.ITEM_WAIT, wait)
    service.handle(demo.ITEM_NEST, nest)
    service.handle(demo.ITEM_PUT, put, lock=lambda r: f"item/{r.name}")
    service.stream(demo.ITEM_LIST, things)
    await service.start()
    try:
        yield run
    finally:
        await service.drain(1)
        await theirs.close()
        await ours.close()
        database.close()
        locks.close()


BIG = Verb("demo", "item", "big", Get, Item, behaviour=behaves("A big item."))


async def nobody_waits(run: Any) -> None:
    """Every mailbox of a call or stream is closed again, a moment after its end."""
    async with asyncio.timeout(2):
        while run.service.client.mux.waiting or run.client.mux.waiting:
            await asyncio.sleep(0.01)
    assert run.service.client.mux.waiting == run.client.mux.waiting == 0


async def request(connection: Connection, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Any:
    """A request as any NATS client makes one."""
    # Raw, without what the client does for its callers: a service that is just coming up is asked again.
    for _ in range(50):
        with suppress(nats.errors.NoRespondersError):
            return await connection.request(subject, data, timeout=2, headers=headers)
        await asyncio.sleep(0.05)
    raise AssertionError(f"nobody answers {subject}")


async def test_answers_errors_and_no_secrets(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        assert (await run.client.call(demo.ITEM_GET, Get(name="a"))).name == "a"
        with pytest.raises(NotFound, match="put it first"):
            await run.client.call(demo.ITEM_GET, Get(name="gone"))
        with pytest.raises(Internal) as raised:
            await run.client.call(demo.ITEM_GET, Get(name="bug"))
        assert "secret" not in str(raised.value)
        reply = await request(run.client.connection, "shoal.v1.n1.default.demo.item.get", pack({"name": "bug"}))
        assert reply.data == b""
        assert "secret" not in str(reply.headers)
        assert "Traceback" not in str(reply.headers)


@pytest.mark.parametrize("payload", [b"\xc1", b"\xff" * 100, pack([1]), pack({"nmae": "x"}), pack({"name": 5}), b"{}"])
async def test_malformed_payload_is_invalid_argument(natsd: NatsServer, tmp_path: Path, payload: bytes) -> None:
    async with running(natsd, tmp_path) as run:
        for verb in ("get", "put", "wait", "list"):
            reply = await request(run.client.connection, f"shoal.v1.n1.default.demo.item.{verb}", payload)
            assert reply.headers[wire.ERROR_CODE] == "INVALID_ARGUMENT"


async def test_malformed_subjects_and_headers_harm_nobody(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        for token in ("%61", "%FF", "a..b".replace("..", "%2E%2E"), "-", "%5F"):
            reply = await request(run.client.connection, f"shoal.v1.n1.{token}.demo.item.get", pack({"name": "x"}))
            assert reply.headers[wire.ERROR_CODE] == "INVALID_ARGUMENT"
        subject, data = "shoal.v1.n1.default.demo.item.get", pack({"name": "x"})
        reply = await request(run.client.connection, subject, data, {wire.REQUEST_ID: "ü" * 10})
        assert reply.headers[wire.ERROR_CODE] == "INVALID_ARGUMENT"
        reply = await request(run.client.connection, subject, data, {wire.TIMEOUT: "soon", "traceparent": "x"})
        assert wire.ERROR_CODE not in reply.headers if reply.headers else True
        # What nats-py wouldn't send: a subject that isn't UTF-8, and headers that are none.
        with socket.create_connection(("127.0.0.1", natsd.port)) as raw:
            raw.recv(4096)
            credential = json.dumps({"user": natsd.user, "pass": natsd.password, "headers": True, "verbose": False})
            raw.sendall(f"CONNECT {credential}\r\n".encode())
            raw.sendall(b"PUB shoal.v1.n1.\xff\xfe.demo.item.get 1\r\nx\r\n")
            raw.sendall(b"HPUB shoal.v1.n1.default.demo.item.get 12 13\r\nNATS/1.0\r\n\r\nx\r\n")
            raw.sendall(b"HPUB shoal.v1.n1.default.demo.item.get 15 16\r\nNATS/1.0  \xff\r\n\r\nx\r\nPING\r\n")
            raw.settimeout(2)
            assert b"PONG" in raw.recv(4096)
        assert (await run.client.call(demo.ITEM_GET, Get(name="a"), timeout=2)).name == "a"


async def test_nothing_there_is_unavailable_once_patience_ends(connection: Connection) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="nothing answers"):
        await Client(connection, "n1").call(demo.ITEM_GET, Get(name="a"), patience=0.5)
    assert time.monotonic() - began < 5


async def test_caller_whose_time_is_up_hears_so_and_is_not_served_late(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path, bound=1) as run:
        slow = asyncio.create_task(run.client.call(demo.ITEM_GET, Get(name="slow 1")))
        await asyncio.sleep(0.1)
        with pytest.raises(DeadlineExceeded):
            await run.client.call(demo.ITEM_GET, Get(name="slow 2"), timeout=0.2)
        await slow
        await asyncio.sleep(0.2)
        assert run.begun == ["slow 1"]


async def test_handlers_that_call_their_own_service_never_wait_for_a_slot_of_their_own(
    natsd: NatsServer, tmp_path: Path
) -> None:
    async with running(natsd, tmp_path, bound=2) as run, asyncio.timeout(10):
        await asyncio.gather(*(run.client.call(demo.ITEM_NEST, Get(name="5")) for _ in range(20)))


async def test_requests_waiting_for_one_lock_leave_slots_to_others(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path, bound=2) as run, asyncio.timeout(10):
        puts = [asyncio.create_task(run.client.call(demo.ITEM_PUT, Put(name="a", seconds=0.1))) for _ in range(10)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await run.client.call(demo.ITEM_GET, Get(name="x"))
        assert time.monotonic() - began < 0.5
        await asyncio.gather(*puts)


async def test_600_waits_use_up_no_slot(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path, bound=4) as run:
        waits = [asyncio.create_task(run.client.call(demo.ITEM_WAIT, Get(name="x"), timeout=None)) for _ in range(600)]
        await asyncio.sleep(0.5)
        async with asyncio.timeout(3):
            await run.client.call(demo.ITEM_PUT, Put(name="kill"))
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        assert run.client.mux.waiting == 0


async def test_list_of_2000_with_20_kb_each(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        things = await run.client.collect(demo.ITEM_LIST, ListItems(count=2000, size=20_000))
        assert [thing.number for thing in things] == list(range(2000))
        assert all(len(thing.body) == 20_000 for thing in things)
        await nobody_waits(run)


async def test_error_at_the_end_of_a_stream_comes_after_its_items(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        got = []
        stream = run.client.stream(demo.ITEM_LIST, ListItems(count=5, size=1))
        with pytest.raises(NotFound):  # noqa: PT012 (the loop is what raises)
            async for thing in stream:
                got.append(thing.number)  # noqa: PERF401 (it raises)
        assert got == [0, 1, 2, 3, 4]


async def test_stream_left_early_stops_at_once(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        async for _ in run.client.stream(demo.ITEM_LIST, ListItems(count=1_000_000, size=10_000)):
            break
        async with asyncio.timeout(3):
            while not run.ended:
                await asyncio.sleep(0.02)
        async for _ in run.client.stream(demo.ITEM_LIST, ListItems(count=1000, pause=0.3)):  # and while it is idle
            break
        async with asyncio.timeout(2):
            while len(run.ended) < 2:
                await asyncio.sleep(0.02)
        await nobody_waits(run)
        assert len(run.ended) == 2


async def test_receiver_that_vanishes_ends_the_stream(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        doomed = await connect(natsd.address, name="doomed")
        stream = Client(doomed, "n1").stream(demo.ITEM_LIST, ListItems(count=1_000_000, size=10_000))
        await anext(stream)
        await doomed.close()
        async with asyncio.timeout(10):
            while not run.ended or run.service.client.mux.waiting:
                await asyncio.sleep(0.05)
        await stream.aclose()  # type: ignore[attr-defined]


async def test_slow_receiver_gets_all_of_it(natsd: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_IDLE_SECONDS", 0.6)  # the reader below is slower than that
    async with running(natsd, tmp_path) as run:
        numbers = []
        async for thing in run.client.stream(demo.ITEM_LIST, ListItems(count=40, size=400_000)):
            numbers.append(thing.number)
            if thing.number == 3:
                await asyncio.sleep(2)
        assert numbers == list(range(40))


async def test_idle_stream_is_kept_alive(natsd: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_IDLE_SECONDS", 0.6)
    async with running(natsd, tmp_path) as run:
        assert len(await run.client.collect(demo.ITEM_LIST, ListItems(count=2, pause=1.0))) == 2


async def test_request_too_large_is_refused_before_it_is_sent(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        sent = run.client.connection.stats["out_msgs"]
        with pytest.raises(ResourceExhausted):
            await run.client.call(demo.ITEM_GET, Get(name="x" * (1 << 20)))
        assert run.client.connection.stats["out_msgs"] == sent


async def test_server_with_a_small_max_payload(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats", extra="max_payload: 65536") as server:
        async with running(server, tmp_path) as run:
            assert len((await run.client.call(BIG, Get(name="500000"))).name) == 500_000
            things = await run.client.collect(demo.ITEM_LIST, ListItems(count=50, size=20_000))
            assert len(things) == 50
            with pytest.raises(ResourceExhausted):
                await run.client.call(demo.ITEM_GET, Get(name="x" * 65_000))


async def test_micro_protocol_shows_the_service(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        await run.client.call(demo.ITEM_GET, Get(name="a"))
        with pytest.raises(NotFound):
            await run.client.call(demo.ITEM_GET, Get(name="gone"))
        connection = run.client.connection
        for verb in ("PING", "INFO", "STATS"):
            reply = json.loads((await request(connection, f"$SRV.{verb}.shoal-demo", b"")).data)
            assert reply["name"] == "shoal-demo"
            assert reply["metadata"] == {"node": "n1"}
        figures = {endpoint["name"]: endpoint for endpoint in reply["endpoints"]}
        assert figures["item-get"]["num_requests"] == 2
        assert figures["item-get"]["num_errors"] == 1
        assert figures["item-get"]["last_error"].startswith("NOT_FOUND")


async def test_all_is_answered_once_per_node(natsd: NatsServer, tmp_path: Path) -> None:
    async with (
        running(natsd, tmp_path / "a") as run,
        running(natsd, tmp_path / "b"),
        running(natsd, tmp_path / "c", node="n2"),
    ):
        connection = run.client.connection
        inbox = connection.new_inbox()
        subscription = await connection.subscribe(inbox)
        subject = subjects.request(subjects.ALL_NODES, "default", "demo", "item", "get")
        await connection.publish(subject, pack({"name": "x"}), inbox)
        replies = 0
        with suppress(Exception):
            while True:
                await subscription.next_msg(timeout=0.5)
                replies += 1
        assert replies == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_connection_comes_back_as_often_as_the_server_does(
    natsd: NatsServer, tmp_path: Path, how: signal.Signals
) -> None:
    async with running(natsd, tmp_path) as run:
        for number in range(4):
            await asyncio.to_thread(natsd.stop, how)
            with pytest.raises(Unavailable):
                await run.client.call(demo.ITEM_GET, Get(name="a"), patience=0.1)
            call = asyncio.create_task(run.client.call(demo.ITEM_PUT, Put(name=str(number))))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(natsd.start)
            assert (await call).name == str(number)
        assert run.begun == ["0", "1", "2", "3"]


async def test_nothing_is_sent_late_whose_caller_has_given_up(natsd: NatsServer, tmp_path: Path) -> None:
    async with running(natsd, tmp_path) as run:
        # A reply that becomes ready while the bus is away is not delivered when it is back.
        late: list[bytes] = []
        slow = asyncio.create_task(run.client.call(demo.ITEM_GET, Get(name="slow"), timeout=0.9))
        await asyncio.sleep(0.1)
        natsd.freeze()
        for number in range(5):
            with suppress(Unavailable, DeadlineExceeded):
                await run.client.call(demo.ITEM_PUT, Put(name=f"late {number}"), timeout=0.05, patience=0.05)
        await asyncio.to_thread(natsd.stop, signal.SIGKILL)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await slow
        await asyncio.to_thread(natsd.start)
        await run.client.call(demo.ITEM_GET, Get(name="a"))
        await asyncio.sleep(0.3)
        assert [name for name in run.begun if name.startswith("late")] == late == []


async def test_wrong_password_while_reconnecting_is_survived(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats") as server:
        connection = await connect(server.address, name="x")
        server.stop()
        right, server.password = server.password, "another"
        server.start()
        await asyncio.sleep(1)
        assert not connection.is_closed
        server.stop()
        server.password = right
        server.start()
        await connection.wait_up(5)
        await connection.flush(2)
        await connection.close()


async def test_server_that_hangs_up_during_the_handshake_is_survived(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats") as server:
        connection = await connect(server.address, name="x")
        server.stop(signal.SIGKILL)

        async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576}\r\n')
            await writer.drain()
            await reader.readline()
            writer.close()

        impostor = await asyncio.start_server(rude, "127.0.0.1", server.port)
        await asyncio.sleep(1.5)
        impostor.close()
        await impostor.wait_closed()
        server.start()
        await connection.wait_up(5)
        await connection.flush(2)
        await connection.close()


async def test_address_where_nothing_is_fails_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="doesn't answer"):
        await connect(Address(urls=[f"nats://127.0.0.1:{free_port()}"]), name="x", patience=0.5)
    assert time.monotonic() - began < 3


async def test_wrong_password_is_unauthenticated(natsd: NatsServer) -> None:
    with pytest.raises(Unauthenticated):
        await connect(Address(urls=natsd.address.urls, user="test", password="wrong"), name="x")


async def test_events_are_read_from_a_time_a_place_and_by_filter(natsd: NatsServer, tmp_path: Path) -> None:
    from tests.faults.test_bus_outbox import publisher

    async with publisher(natsd, tmp_path / "a") as source:
        source.emit("1", "2")
        await source.published()
        all_of_them = [r async for r in read_events(source.connection, start=1, follow=False)]
        await asyncio.sleep(0.05)
        between = all_of_them[-1].event.timestamp.now(all_of_them[-1].event.timestamp.tzinfo)
        await asyncio.sleep(0.05)
        source.emit("3", "web/1.*")
        await source.published()
        connection = source.connection

        async def ids(*patterns: str, **where: Any) -> list[str]:
            return [r.event.id async for r in read_events(connection, patterns, follow=False, **where)]

        assert await ids(start=1) == ["1", "2", "3", "web/1.*"]
        assert await ids(start=3) == ["3", "web/1.*"]
        assert await ids(since=between) == ["3", "web/1.*"]
        assert await ids() == []
        assert await ids(subjects.event_pattern(service="demo", topic="/things/happened", id="2"), start=1) == ["2"]
        two = [subjects.event_pattern(service="demo", topic="/things/happened", id=id) for id in ("1", "web/1.*")]
        assert await ids(*two, start=1) == ["1", "web/1.*"]
        assert await ids(subjects.event_pattern(namespace="other"), start=1) == []
