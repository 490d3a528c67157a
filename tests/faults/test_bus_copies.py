"""Two copies of a service, and what a real `kill -9` in the middle of a request does to them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.consumer import read_events
from shoal_bus.errors import AlreadyExists, Cancelled, InvalidArgument, Unavailable
from shoal_bus.verb import Verb

from tests.support import bus_service as demo
from tests.support.copies import Copies
from tests.support.natsd import NatsServer


@pytest.fixture
def copies(natsd: NatsServer, tmp_path: Path) -> Iterator[Copies]:
    started = Copies(natsd, tmp_path / "node")
    yield started
    started.stop_all()


@pytest.fixture
async def client(connection: Connection) -> Client:
    return Client(connection, "n1")


async def ready(client: Client, count: int = 1) -> None:
    """Returns when `count` copies answer."""
    seen: set[bytes] = set()
    subscription = await client.connection.subscribe("test.ping.*")
    for number in range(200):
        seen = set()
        inbox = f"test.ping.{number}"
        await client.connection.publish("$SRV.PING.shoal-demo", b"", inbox)
        with suppress(Exception):
            while len(seen) < count:
                message = await subscription.next_msg(timeout=0.2)
                if message.data:
                    seen.add(message.data)
        if len(seen) >= count:
            break
    assert len(seen) >= count
    await client.connection.flush()
    await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("verb", "where"), [(demo.ITEM_PUT, "before"), (demo.ITEM_PUT, "after"), (demo.ITEM_ADD, "after")]
)
async def test_request_survives_the_copy_that_served_it(
    copies: Copies, client: Client, verb: Verb[demo.Put, demo.Item], where: str
) -> None:
    copies.start(2)
    await ready(client, 2)
    item = await client.call(verb, demo.Put(name="a", die=where), id="once", timeout=20)
    assert len(copies.alive) == 1
    assert await client.call(verb, demo.Put(name="a", die=where), id="once") == item
    assert demo.journal(copies.root) == ["put a"]


async def test_last_copy_killed_and_started_again_finishes_the_request(copies: Copies, client: Client) -> None:
    copies.start()
    await ready(client)
    call = asyncio.create_task(client.call(demo.ITEM_PUT, demo.Put(name="a", die="before"), timeout=20))
    while copies.alive:
        await asyncio.sleep(0.02)
    copies.start()
    assert (await call).name == "a"
    assert demo.journal(copies.root) == ["put a"]


async def test_orphan_nobody_asks_for_is_finished_by_the_living_copy(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    with suppress(Exception):
        await client.call(demo.ITEM_PUT, demo.Put(name="a", die="before"), timeout=0.3)
    for _ in range(100):
        if demo.journal(copies.root):
            break
        await asyncio.sleep(0.1)
    assert demo.journal(copies.root) == ["put a"]
    with pytest.raises(AlreadyExists):
        await client.call(demo.ITEM_PUT, demo.Put(name="a"))


async def test_same_request_at_both_copies_at_once_is_done_once(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    request = demo.Put(name="a", seconds=0.3)
    answers = await asyncio.gather(*(client.call(demo.ITEM_PUT, request, id="same") for _ in range(20)))
    assert len({(a.name, a.made_by) for a in answers}) == 1
    assert demo.journal(copies.root) == ["put a"]


async def test_id_of_another_request_is_invalid_argument(copies: Copies, client: Client) -> None:
    copies.start()
    await ready(client)
    first = asyncio.create_task(client.call(demo.ITEM_PUT, demo.Put(name="a", seconds=0.3), id="same"))
    await asyncio.sleep(0.1)
    with pytest.raises(InvalidArgument, match="already used"):
        await client.call(demo.ITEM_PUT, demo.Put(name="b"), id="same")  # while it is at work
    await first
    with pytest.raises(InvalidArgument, match="already used"):
        await client.call(demo.ITEM_PUT, demo.Put(name="b"), id="same")  # and after


async def test_copies_share_the_load(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    items = await asyncio.gather(*(client.call(demo.ITEM_PUT, demo.Put(name=f"i{n}")) for n in range(100)))
    assert len({item.made_by for item in items}) == 2
    assert len(set(demo.journal(copies.root))) == len(demo.journal(copies.root)) == 100


async def test_operation_is_taken_over_with_its_progress(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    told: list[int] = []
    work = demo.Work(name="w", steps=6, die_at=3)
    item = await client.operate(demo.ITEM_WORK, work, on_progress=lambda p: told.append(p.step), timeout=40)
    assert item.name == "w"
    assert told
    assert demo.journal(copies.root) == ["work w begun", "work w resumed", "done w"]


async def test_the_last_progress_is_told_of_work_that_is_over_at_once(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    told: list[int] = []
    work = demo.Work(name="w", steps=6, step_seconds=0)
    item = await client.operate(demo.ITEM_RUSH, work, on_progress=lambda p: told.append(p.step), timeout=4)
    assert item.name == "w"
    assert len(told) == 1
    again = await client.operate(demo.ITEM_WORK, work.model_copy(update={"name": "v"}), timeout=4)
    assert again.name == "v"


async def test_cancelled_call_cancels_the_operation(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    work = demo.Work(name="w", steps=1000)
    call = asyncio.create_task(client.operate(demo.ITEM_WORK, work, id="op"))
    await asyncio.sleep(0.5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(50):
        if "undone w" in demo.journal(copies.root):
            break
        await asyncio.sleep(0.1)
    assert demo.journal(copies.root) == ["work w begun", "undone w"]
    with pytest.raises(Cancelled):
        await client.operate(demo.ITEM_WORK, work, id="op")


async def test_transient_failure_is_told_to_all_and_tried_again_by_a_repeat(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    work = demo.Work(name="w", steps=3, fail="the registry is away")
    results = await asyncio.gather(
        *(client.operate(demo.ITEM_WORK, work, id="op") for _ in range(6)), return_exceptions=True
    )
    assert all(isinstance(result, Unavailable) for result in results), results
    assert demo.journal(copies.root).count("work w begun") == 1
    with pytest.raises(Unavailable):
        await client.operate(demo.ITEM_WORK, work, id="op")
    assert demo.journal(copies.root).count("work w begun") == 2


async def test_drain_answers_what_is_in_flight(copies: Copies, client: Client) -> None:
    (copy,) = copies.start()
    await ready(client)
    calls = [asyncio.create_task(client.call(demo.ITEM_PUT, demo.Put(name=f"i{n}", seconds=1))) for n in range(50)]
    await asyncio.sleep(0.3)
    copy.process.send_signal(signal.SIGTERM)
    assert {item.made_by for item in await asyncio.gather(*calls)} == {copy.process.pid}
    assert await asyncio.to_thread(copy.process.wait, 10) == 0


async def test_waits_move_to_another_copy_when_theirs_stops(copies: Copies, client: Client) -> None:
    first = copies.start()[0]
    await ready(client)
    waits = [asyncio.create_task(client.call(demo.ITEM_WAIT, demo.Get(name="late"), timeout=None)) for _ in range(20)]
    await asyncio.sleep(0.3)
    copies.start()
    await ready(client, 2)
    assert await asyncio.to_thread(first.stop, signal.SIGTERM) == 0
    await client.call(demo.ITEM_PUT, demo.Put(name="late"))
    async with asyncio.timeout(5):
        assert all(item.name == "late" for item in await asyncio.gather(*waits))


async def test_waits_hear_of_a_restart_at_once(copies: Copies, client: Client) -> None:
    first = copies.start()[0]
    await ready(client)
    wait = asyncio.create_task(client.call(demo.ITEM_WAIT, demo.Get(name="late"), timeout=None))
    await asyncio.sleep(0.3)
    first.stop()
    copies.start()
    await client.call(demo.ITEM_PUT, demo.Put(name="late"), timeout=20)
    async with asyncio.timeout(5):
        assert (await wait).name == "late"


async def test_600_waits_leave_room_for_others(copies: Copies, client: Client) -> None:
    copies.start()
    await ready(client)
    waits = [asyncio.create_task(client.call(demo.ITEM_WAIT, demo.Get(name="late"), timeout=None)) for _ in range(600)]
    await asyncio.sleep(1)
    async with asyncio.timeout(5):
        await client.call(demo.ITEM_PUT, demo.Put(name="late"))
    async with asyncio.timeout(10):
        await asyncio.gather(*waits)


async def test_events_survive_kills_of_their_publisher(copies: Copies, client: Client) -> None:
    copies.start(2)
    await ready(client, 2)
    got: list[str] = []

    async def listen() -> None:
        async with aclosing(read_events(client.connection)) as events:
            async for received in events:
                got.append(received.event.id)  # noqa: PERF401 (the test looks at it meanwhile)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.3)
    names = [f"i{n}" for n in range(200)]

    async def put_all() -> None:
        for name in names:
            await client.call(demo.ITEM_PUT, demo.Put(name=name), timeout=30)

    putting = asyncio.create_task(put_all())
    for _ in range(4):
        await asyncio.sleep(0.15)
        copies.alive[0].stop()
        copies.start()
        await ready(client, 2)
    await putting
    async with asyncio.timeout(15):
        while len(got) < len(names):
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    listener.cancel()
    assert got == names
