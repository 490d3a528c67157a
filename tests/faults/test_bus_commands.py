"""Durable commands, with dispatchers, services and the server killed in the middle: each done once, and told once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.commands import submit
from shoal_bus.dispatcher import ATTEMPTS

from tests.support import bus_service as demo
from tests.support.commands import CommandNode, command_node
from tests.support.natsd import NatsServer


@pytest.fixture
async def node(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[CommandNode]:
    async with command_node(natsd, tmp_path / "node") as started:
        yield started


async def put(node: CommandNode, name: str, *, die: str = "", seconds: float = 0) -> str:
    return await submit(node.client, demo.ITEM_PUT, demo.Put(name=name, die=die, seconds=seconds), id=name)


@pytest.mark.parametrize("where", ["before", "asked", "answered", "ended"])
async def test_command_survives_its_dispatcher(node: CommandNode, where: str) -> None:
    node.copies.start()
    await put(node, "a", seconds=0.6)
    dying = node.dispatch(die=where)
    assert await asyncio.to_thread(dying.wait, 20) == -signal.SIGKILL
    node.dispatch()
    assert await node.ended(1) == [("/commands/done", "a")]
    assert demo.journal(node.copies.root) == ["put a"]


async def test_command_that_ends_every_dispatcher_fails(node: CommandNode) -> None:
    node.copies.start()
    await put(node, "a")
    for _ in range(ATTEMPTS):
        dying = node.dispatch(die="before")
        assert await asyncio.to_thread(dying.wait, 20) == -signal.SIGKILL
    node.dispatch(die="before")
    assert await node.ended(1) == [("/commands/failed", "a")]
    assert node.of("a").payload["code"] == "INTERNAL"


async def test_order_holds_over_a_killed_dispatcher(node: CommandNode) -> None:
    node.copies.start()
    first = node.dispatch()
    await put(node, "a", seconds=1.5)
    for number in range(5):
        await submit(node.client, demo.ITEM_PUT, demo.Put(name="a"), id=f"a{number}")
    await asyncio.sleep(0.7)
    node.kill(first)
    node.dispatch()
    await submit(node.client, demo.ITEM_PUT, demo.Put(name="a"), id="a5")
    assert await node.ended(7) == [("/commands/done", "a"), *(("/commands/failed", f"a{n}") for n in range(6))]


@pytest.mark.parametrize("where", ["before", "after"])
async def test_command_survives_its_service(node: CommandNode, where: str) -> None:
    (copy,) = node.copies.start()
    node.dispatch()
    await put(node, "a", die=where)
    await asyncio.to_thread(copy.process.wait, 20)
    node.copies.start()
    assert await node.ended(1) == [("/commands/done", "a")]
    assert demo.journal(node.copies.root) == ["put a"]


async def test_operation_goes_on_when_its_dispatcher_dies(node: CommandNode) -> None:
    node.copies.start()
    await submit(node.client, demo.ITEM_WORK, demo.Work(name="w", steps=30), id="w")
    dying = node.dispatch(die="asked")
    await asyncio.to_thread(dying.wait, 20)
    node.dispatch()
    assert await node.ended(1) == [("/commands/done", "w")]
    assert demo.journal(node.copies.root) == ["work w begun", "done w"]


async def test_operation_goes_on_when_its_dispatcher_stops_orderly(node: CommandNode) -> None:
    node.copies.start()
    first = node.dispatch()
    await submit(node.client, demo.ITEM_WORK, demo.Work(name="w", steps=30), id="w")
    while not demo.journal(node.copies.root):
        await asyncio.sleep(0.02)
    node.kill(first, signal.SIGTERM)
    assert first.returncode == 0
    node.dispatch()
    assert await node.ended(1) == [("/commands/done", "w")]
    assert demo.journal(node.copies.root) == ["work w begun", "done w"]


async def test_one_of_two_dispatchers_works_and_the_other_takes_over(node: CommandNode) -> None:
    node.copies.start()
    both = [node.dispatch(), node.dispatch()]
    for number in range(100):
        await put(node, f"i{number}")
    await node.ended(100)
    assert sorted(demo.journal(node.copies.root)) == sorted(f"put i{n}" for n in range(100))
    logs = [(node.directory / f"dispatcher{n}.log").read_text() for n in range(2)]
    working = [n for n, log in enumerate(logs) if "command.done" in log]
    assert len(working) == 1
    node.kill(both[working[0]])
    await put(node, "last")
    await node.ended(101)


async def test_commands_survive_the_server(node: CommandNode) -> None:
    node.copies.start()
    node.dispatch()
    for number in range(20):
        await put(node, f"i{number}", seconds=0.5)
    node.natsd.stop(signal.SIGKILL)
    await asyncio.sleep(2)
    node.natsd.start()
    await put(node, "last")
    outcomes = await node.ended(21, 60)
    assert sorted(outcomes) == sorted(("/commands/done", name) for name in [*(f"i{n}" for n in range(20)), "last"])
    assert sorted(demo.journal(node.copies.root)) == sorted(f"put {id}" for _, id in outcomes)
