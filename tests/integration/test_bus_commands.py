"""Durable commands on a real server: they wait for their node, come in order, expire, and end in one event each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext
from shoal_bus import streams, subjects, wire
from shoal_bus.api import content, network, runtime
from shoal_bus.commands import submit
from shoal_bus.errors import InvalidArgument, ResourceExhausted

from tests.support import bus_service as demo
from tests.support.commands import CommandNode, command_node
from tests.support.natsd import NatsServer
from tests.support.node import TestNode


@pytest.fixture
async def node(natsd: NatsServer, tmp_path: Path) -> AsyncIterator[CommandNode]:
    async with command_node(natsd, tmp_path / "node") as started:
        yield started


async def put(node: CommandNode, name: str, **more: Any) -> str:
    given = {key: more.pop(key) for key in ("die", "seconds") if key in more}
    return await submit(node.client, demo.ITEM_PUT, demo.Put(name=name, **given), **more)


async def waiting(node: CommandNode) -> int:
    info = await JetStreamContext(node.client.connection).stream_info(streams.COMMANDS)
    return info.state.messages


async def test_offline_node_gets_its_command_when_it_comes_up(node: CommandNode) -> None:
    await put(node, "a", id="first")
    assert await waiting(node) == 1
    node.dispatch()
    await asyncio.sleep(1)
    assert node.outcomes() == []  # the service isn't there yet
    node.copies.start()
    assert await node.ended(1) == [("/commands/done", "first")]
    done = node.of("first")
    assert done.namespace == "default"
    assert done.payload["verb"] == "demo.item.put"
    assert done.payload["reply"]["name"] == "a"
    assert demo.journal(node.copies.root) == ["put a"]
    assert await waiting(node) == 0


async def test_command_submitted_again_is_the_same_command(node: CommandNode) -> None:
    await put(node, "a", id="same")
    await put(node, "a", id="same")
    node.copies.start()
    node.dispatch()
    await node.ended(1)
    await put(node, "a", id="same")
    # Past the stream's duplicate window, which a message id of its own stands for:
    headers = {wire.REQUEST_ID: "same", "Nats-Msg-Id": "another"}
    subject = subjects.command("n1", "default", "demo", "item", "put")
    js = JetStreamContext(node.client.connection)
    await js.publish(subject, demo.Put(name="a").pack(), headers=headers)
    await put(node, "b", id="last")
    assert await node.ended(2) == [("/commands/done", "same"), ("/commands/done", "last")]
    assert demo.journal(node.copies.root) == ["put a", "put b"]
    assert await waiting(node) == 0


async def test_commands_for_one_container_come_in_order_and_others_do_not_wait(node: CommandNode) -> None:
    node.copies.start()
    await put(node, "slow", id="slow-0", seconds=1.5)
    for number in range(1, 6):
        await put(node, "slow", id=f"slow-{number}")
        await put(node, f"quick{number}", id=f"quick-{number}")
    node.dispatch()
    outcomes = await node.ended(11)
    slow = [outcome for outcome in outcomes if outcome[1].startswith("slow")]
    # The item is there after the first: had another come before it, that one would be done, and this one failed.
    expected = [("/commands/done", "slow-0"), *(("/commands/failed", f"slow-{n}") for n in range(1, 6))]
    assert slow == expected
    assert outcomes.index(slow[0]) == 5, "the others had to wait"
    assert node.of("slow-1").payload["code"] == "ALREADY_EXISTS"


async def test_same_container_of_another_namespace_does_not_wait(node: CommandNode) -> None:
    node.copies.start()
    await put(node, "a", id="here", seconds=1.5)
    await submit(node.client.with_namespace("other"), demo.ITEM_PUT, demo.Put(name="b"), id="there")
    node.dispatch()
    assert [id for _, id in await node.ended(2)] == ["there", "here"]


async def test_command_expires_by_the_servers_clock_and_is_not_done(node: CommandNode) -> None:
    await put(node, "late", id="late", expires=0.5)
    await put(node, "kept", id="kept", expires=60)
    await asyncio.sleep(1)
    node.copies.start()
    node.dispatch()
    assert set(await node.ended(2)) == {("/commands/expired", "late"), ("/commands/done", "kept")}
    assert node.of("late").payload["expires"] == 0.5
    assert demo.journal(node.copies.root) == ["put kept"]


async def test_command_expires_while_its_service_is_away(node: CommandNode) -> None:
    node.dispatch()
    await put(node, "late", id="late", expires=1)
    assert await node.ended(1) == [("/commands/expired", "late")]
    node.copies.start()
    await put(node, "next", id="next")
    await node.ended(2)
    assert demo.journal(node.copies.root) == ["put next"]


async def test_operation_is_carried_out_as_a_command(node: CommandNode) -> None:
    node.copies.start()
    node.dispatch()
    await submit(node.client, demo.ITEM_WORK, demo.Work(name="w"), id="work")
    assert await node.ended(1) == [("/commands/done", "work")]
    assert demo.journal(node.copies.root) == ["work w begun", "done w"]


async def test_what_can_not_be_carried_out_fails_once_and_is_gone(node: CommandNode) -> None:
    node.copies.start()
    node.dispatch()
    js = JetStreamContext(node.client.connection)
    await streams.ensure_commands(js)

    async def publish(path: str, data: bytes = b"", **headers: str) -> None:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        await js.publish(f"{subjects.ROOT}.n1.{path}", data, headers=told)

    good = demo.Put(name="a").pack()
    await publish("default.command.demo.item.put", b"\xc1 not msgpack", Shoal_Request_Id="payload")
    await publish("default.command.demo.item.put", demo.Get(name="a").pack() + b"x", Shoal_Request_Id="garbage")
    await publish("default.command.demo.item.nothing", good, Shoal_Request_Id="verb")
    await publish("default.command.demo.item.get", good, Shoal_Request_Id="question")
    await publish("default.command.demo", good, Shoal_Request_Id="subject")
    await publish("_.command.demo.item.put", good, Shoal_Request_Id="whole-node")
    await publish("de%66ault.command.demo.item.put", good, Shoal_Request_Id="spelling")
    await publish("default.command.demo.item.put", good, Shoal_Request_Id="expiry", Shoal_Expires="soon")
    await publish("default.command.demo.item.put", good, Shoal_Request_Id="x" * 1000)
    outcomes = await node.ended(9)
    assert {topic for topic, _ in outcomes} == {"/commands/failed"}
    assert {e.payload["code"] for e in node.events} == {"INVALID_ARGUMENT"}
    assert {id for _, id in outcomes if not id.startswith("unnamed")} == {
        "payload", "garbage", "verb", "question", "subject", "whole-node", "spelling", "expiry",
    }  # fmt: skip
    await publish("default.command.demo.item.put", good)  # nothing but a payload: all that a command needs
    await node.ended(10)
    assert demo.journal(node.copies.root) == ["put a"]
    assert await waiting(node) == 0


async def test_id_of_another_command_fails(node: CommandNode) -> None:
    node.copies.start()
    node.dispatch()
    await put(node, "a", id="same")
    await node.ended(1)
    js = JetStreamContext(node.client.connection)
    subject = subjects.command("n1", "default", "demo", "item", "put")
    await js.publish(subject, demo.Put(name="b").pack(), headers={wire.REQUEST_ID: "same"})
    assert await node.ended(2) == [("/commands/done", "same"), ("/commands/failed", "same")]
    assert demo.journal(node.copies.root) == ["put a"]


async def test_submit_refuses_what_no_dispatcher_could_carry_out(node: CommandNode) -> None:
    with pytest.raises(InvalidArgument, match="one node"):
        await put_on_all(node)
    with pytest.raises(InvalidArgument, match="changes nothing"):
        await submit(node.client, network.NETWORK_GET, network.NetworkRequest(id="a"))
    with pytest.raises(InvalidArgument, match="expires"):
        await put(node, "a", expires=-1)
    with pytest.raises(InvalidArgument, match="expires"):
        await put(node, "a", expires=float("nan"))
    with pytest.raises(InvalidArgument, match="id"):
        await put(node, "a", id="ö")
    with pytest.raises(ResourceExhausted, match="bytes"):
        await submit(node.client, runtime.CONTAINER_CREATE, runtime.CreateContainer(id="a", spec={"x": "y" * 2**20}))


async def put_on_all(node: CommandNode) -> None:
    await submit(node.client.with_node(subjects.ALL_NODES), demo.ITEM_PUT, demo.Put(name="a"))


async def test_full_stream_refuses_and_drops_nothing(node: CommandNode) -> None:
    js = JetStreamContext(node.client.connection)
    await streams.ensure_commands(js)
    config = (await js.stream_info(streams.COMMANDS)).config
    config.max_bytes = 20_000
    await js.update_stream(config)
    taken = 0
    while (await js.stream_info(streams.COMMANDS)).state.bytes < 19_000:
        await put(node, f"i{taken}")
        taken += 1
    with pytest.raises(ResourceExhausted, match="no room"):
        await put(node, "large" * 1000)
    node.copies.start()
    node.dispatch()
    await node.ended(taken)
    await put(node, "next")


async def test_one_id_for_a_command_to_each_of_two_nodes(node: CommandNode) -> None:
    await put(node, "a", id="both")
    await submit(node.client.with_node("n2"), demo.ITEM_PUT, demo.Put(name="a"), id="both")
    assert await waiting(node) == 2
    node.copies.start()
    node.dispatch()
    await node.ended(1)
    assert await waiting(node) == 1, "the other node's command is its own"


async def test_gateway_hosts_the_dispatcher(node: CommandNode, natsd: NatsServer, tmp_path: Path) -> None:
    there = node.client.with_node("test-node")
    request = content.SaveNamespace(name="tenant", labels={"a": "b"})
    id = await submit(there, content.NAMESPACE_CREATE, request)
    with TestNode(tmp_path, natsd) as real:
        real.start("gateway", "gateway", "content")
        assert await node.ended(1) == [("/commands/done", id)]
        assert node.of(id).namespace == ""
        found = await there.call(content.NAMESPACE_GET, content.NamespaceRequest(name="tenant"))
        assert found.labels == {"a": "b"}


async def test_thousand_commands_wait_while_their_service_is_away(node: CommandNode) -> None:
    for start in range(0, 1000, 100):
        await asyncio.gather(*(put(node, f"i{n}", id=f"i{n}") for n in range(start, start + 100)))
    node.dispatch()
    await asyncio.sleep(2)
    node.copies.start()
    assert len(await node.ended(1000, 60)) == 1000
    assert len(set(demo.journal(node.copies.root))) == len(demo.journal(node.copies.root)) == 1000
    assert await waiting(node) == 0
