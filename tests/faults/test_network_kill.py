"""The network service is killed at many points of what it does: afterwards it is done, or was never begun."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import network as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import NotFound, ShoalError
from shoal_bus.message import Empty

from tests.support.natsd import NatsServer
from tests.support.netns import NetworkNode, addresses, links, ping

# Making one takes about 20 milliseconds, removing it 60.
DELAYS = [0.001, 0.003, 0.006, 0.009, 0.012, 0.016, 0.02, 0.025, 0.032, 0.045]


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[NetworkNode]:
    with NetworkNode(tmp_path, natsd) as started:
        started.start_copy()
        yield started


@pytest.fixture
async def client(node: NetworkNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def attach(id: str, number: int) -> api.AttachLink:
    return api.AttachLink(
        id=id, bridge="br-k", bridge_address="10.79.0.1/24", addresses=[f"10.79.0.{number}/24"], gateway="10.79.0.1"
    )


async def make(client: Client, id: str, number: int) -> tuple[api.Network, api.Attachment]:
    """A network with one interface, by requests whose ids follow from its own."""
    made = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id=id), id=f"{id}.create")
    return made, await client.call(api.LINK_ATTACH, attach(id, number), id=f"{id}.attach")


async def kill_and_restart(node: NetworkNode, delay: float) -> None:
    await asyncio.sleep(delay)
    node.of("network").kill()
    await asyncio.to_thread(node.of("network").start)


async def test_killed_anywhere_in_create_attach_and_delete_it_is_whole_in_the_end(
    node: NetworkNode, client: Client
) -> None:
    for number, delay in enumerate(DELAYS, 2):
        id = f"n{number}"
        making = asyncio.create_task(make(client, id, number))
        await kill_and_restart(node, delay)
        made, attached = await making
        assert await make(client, id, number) == (made, attached)
        assert await client.call(api.NETWORK_GET, api.NetworkRequest(id=id)) == made.model_copy(
            update={"attachments": [attached]}
        )
        assert links(node.host)[attached.host_interface]["master"] == "br-k"
        assert set(links(made.path)) == {"eth0"}
        assert ping(made.path, "10.79.0.1")

        delete = api.NetworkRequest(id=id)
        deleting = asyncio.create_task(client.call(api.NETWORK_DELETE, delete, id=f"{id}.delete"))
        await kill_and_restart(node, 2 * delay)
        await deleting
        await client.call(api.NETWORK_DELETE, delete, id=f"{id}.delete")
        with pytest.raises(NotFound):
            await client.call(api.NETWORK_GET, delete)
        node.assert_nothing_left()
    events = await node.events(client, 4 * len(DELAYS))
    topics = ["/networks/create", "/networks/attach", "/networks/detach", "/networks/delete"]
    assert [(e.topic, e.id) for e in events] == [
        (topic, f"n{number}") for number in range(2, len(DELAYS) + 2) for topic in topics
    ]


async def test_killed_request_that_nobody_repeats_leaves_the_whole_or_nothing(
    node: NetworkNode, client: Client
) -> None:
    for number, delay in enumerate(DELAYS, 2):
        id = f"n{number}"
        making = asyncio.create_task(make(client, id, number))
        await asyncio.sleep(delay)
        node.of("network").kill()
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
        await asyncio.to_thread(node.of("network").start)
        # Whatever this asks, what was begun on this network is finished before it.
        outcomes = await asyncio.gather(
            client.call(api.NETWORK_DELETE, api.NetworkRequest(id=id)), return_exceptions=True
        )
        assert all(isinstance(outcome, NotFound | Empty) for outcome in outcomes), outcomes
        node.assert_nothing_left()
        assert await client.collect(api.NETWORK_LIST, api.ListNetworks()) == []
    told = Counter((event.topic, event.id) for event in await node.events(client, 0))
    for number in range(2, len(DELAYS) + 2):
        assert told["/networks/create", f"n{number}"] == told["/networks/delete", f"n{number}"] <= 1
        assert told["/networks/attach", f"n{number}"] == told["/networks/detach", f"n{number}"] <= 1


async def test_orphan_is_finished_though_nobody_asks(node: NetworkNode, client: Client) -> None:
    making = asyncio.create_task(make(client, "web", 2))
    while not node.netns.exists() or not list(node.netns.iterdir()):
        await asyncio.sleep(0.0005)
    node.of("network").kill()
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    await asyncio.to_thread(node.of("network").start)
    for _ in range(100):
        found = await client.collect(api.NETWORK_LIST, api.ListNetworks())
        if found:
            break
        await asyncio.sleep(0.1)
    assert [network.id for network in found] == ["web"]


async def test_same_requests_at_two_copies_are_done_once(node: NetworkNode, client: Client) -> None:
    node.start_copy()
    for number in range(2, 6):
        made = await asyncio.gather(*(make(client, f"n{number}", number) for _ in range(8)))
        assert all(one == made[0] for one in made)
    deletes = [
        client.call(api.NETWORK_DELETE, api.NetworkRequest(id=f"n{number}"), id=f"d{number}")
        for number in range(2, 6)
        for _ in range(4)
    ]
    await asyncio.gather(*deletes)
    node.assert_nothing_left()
    assert set(Counter((e.topic, e.id) for e in await node.events(client, 16)).values()) == {1}


async def test_two_copies_share_one_bridge_while_either_is_killed(node: NetworkNode, client: Client) -> None:
    node.start_copy()
    numbers = range(2, 34)

    async def life(number: int) -> None:
        made, _ = await make(client, f"n{number}", number)
        assert await asyncio.to_thread(ping, made.path, "10.79.0.1")
        if number % 2:
            await client.call(api.NETWORK_DELETE, api.NetworkRequest(id=f"n{number}"), id=f"n{number}.delete")

    living = asyncio.gather(*(life(number) for number in numbers))
    for copy in (0, 1, 0, 1):
        await asyncio.sleep(0.1)
        node.of("network", copy).kill()
        await asyncio.to_thread(node.of("network", copy).start)
    await living
    left = await client.collect(api.NETWORK_LIST, api.ListNetworks())
    assert len(left) == len(numbers) // 2
    hosts = {network.attachments[0].host_interface for network in left}
    assert set(links(node.host)) == {"br-k", *hosts}
    assert addresses(links(node.host)["br-k"]) == ["10.79.0.1/24"]
    errors = await asyncio.gather(
        *(client.call(api.NETWORK_DELETE, api.NetworkRequest(id=network.id)) for network in left),
        return_exceptions=True,
    )
    assert not [error for error in errors if isinstance(error, ShoalError)]
    node.assert_nothing_left()
    told = Counter((e.topic, e.id) for e in await node.events(client, 4 * len(numbers)))
    assert len(told) == 4 * len(numbers)
    assert set(told.values()) == {1}
