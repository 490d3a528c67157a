"""The network service over the bus: what it answers, what it refuses, what it tells, and what it mends at start."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import network as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShoalError

from tests.support.natsd import NatsServer
from tests.support.netns import NetworkNode, addresses, ip, links, ping


@pytest.fixture
def node(tmp_path: Path, natsd: NatsServer) -> Iterator[NetworkNode]:
    with NetworkNode(tmp_path, natsd) as started:
        started.start_copy()
        yield started


@pytest.fixture
async def client(node: NetworkNode, connection: Connection) -> Client:
    return Client(connection, node.name)


def attach(id: str, number: int, **fields: Any) -> api.AttachLink:
    subnet = {"addresses": [f"10.78.0.{number}/24", f"fd78::{number}/64"], "bridge_address": "10.78.0.1/24"}
    return api.AttachLink(**({"id": id, "bridge": "br-s", "gateway": "10.78.0.1"} | subnet | fields))


def shapes(netns: Path | str) -> dict[str, Any]:
    """What matters of each link: its bridge, its flags, its addresses."""
    return {name: (link.get("master"), link["flags"], addresses(link)) for name, link in links(netns).items()}


async def test_life_of_a_network(node: NetworkNode, client: Client) -> None:
    made = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web", labels={"app": "shop"}))
    assert Path(made.path).parent == node.netns
    attached = await client.call(api.LINK_ATTACH, attach("web", 2))
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="db"))
    await client.call(api.LINK_ATTACH, attach("db", 3))
    assert ping(made.path, "10.78.0.3")
    assert ping(made.path, "fd78::3")
    assert ping(made.path, "10.78.0.1")
    found = await client.call(api.NETWORK_GET, api.NetworkRequest(id="web"))
    assert found == made.model_copy(update={"attachments": [attached]})
    assert attached.mac == links(made.path)["eth0"]["address"]

    await client.call(api.LINK_DETACH, api.DetachLink(id="db"))
    await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="db"))
    assert set(links(node.host)) == {"br-s", attached.host_interface}
    await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="web"))
    node.assert_nothing_left()
    assert [(e.topic, e.id) for e in await node.events(client, 8)] == [
        ("/networks/create", "web"),
        ("/networks/attach", "web"),
        ("/networks/create", "db"),
        ("/networks/attach", "db"),
        ("/networks/detach", "db"),
        ("/networks/delete", "db"),
        ("/networks/detach", "web"),
        ("/networks/delete", "web"),
    ]


async def test_events_say_what_was_attached(node: NetworkNode, client: Client) -> None:
    made = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    await client.call(api.LINK_ATTACH, attach("web", 2, interface="net1"))
    create, attached = await node.events(client, 2)
    assert create.payload == {"id": "web", "path": made.path}
    assert attached.payload == {
        "id": "web", "interface": "net1", "bridge": "br-s", "addresses": ["10.78.0.2/24", "fd78::2/64"],
    }  # fmt: skip
    assert (attached.namespace, attached.service, attached.node) == ("default", "network", node.name)


async def test_list_is_filtered_and_of_one_namespace(client: Client) -> None:
    for id, labels in (("a", {"app": "shop"}), ("b", {"app": "shop", "tier": "db"}), ("c", {})):
        await client.call(api.NETWORK_CREATE, api.CreateNetwork(id=id, labels=labels))
    elsewhere = client.with_namespace("elsewhere")
    other = await elsewhere.call(api.NETWORK_CREATE, api.CreateNetwork(id="a"))

    async def ids(*filters: str) -> list[str]:
        return [found.id for found in await client.collect(api.NETWORK_LIST, api.ListNetworks(filters=list(filters)))]

    assert await ids() == ["a", "b", "c"]
    assert await ids("labels.app==shop") == ["a", "b"]
    assert await ids("labels.tier", "id==c") == ["b", "c"]
    assert await elsewhere.collect(api.NETWORK_LIST, api.ListNetworks()) == [other]
    assert other.path != (await client.call(api.NETWORK_GET, api.NetworkRequest(id="a"))).path


async def test_many_interfaces_and_address_of_the_bridge_until_the_last(node: NetworkNode, client: Client) -> None:
    ip(node.host, "link", "add", "br-s", "type", "bridge")  # somebody else's
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    for number in range(2, 6):
        await client.call(api.LINK_ATTACH, attach("web", number, interface=f"net{number}", gateway=""))
    assert addresses(links(node.host)["br-s"]) == ["10.78.0.1/24"]
    for number in range(2, 6):
        await client.call(api.LINK_DETACH, api.DetachLink(id="web", interface=f"net{number}"))
        assert addresses(links(node.host)["br-s"]) == (["10.78.0.1/24"] if number < 5 else [])


async def test_address_of_somebody_else_stays_on_their_bridge(node: NetworkNode, client: Client) -> None:
    ip(node.host, "link", "add", "br-s", "type", "bridge")
    ip(node.host, "address", "add", "10.78.0.1/24", "dev", "br-s")
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    await client.call(api.LINK_ATTACH, attach("web", 2))
    await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="web"))
    assert addresses(links(node.host)["br-s"]) == ["10.78.0.1/24"]


BAD: list[tuple[dict[str, Any], type[ShoalError], str]] = [
    ({"id": "nobody"}, NotFound, "network nobody: not found"),
    ({"interface": "eth0"}, AlreadyExists, "interface eth0 of network web: is attached already"),
    ({"addresses": ["10.78.0.2/24"], "gateway": "10.79.0.1"}, InvalidArgument, "gateway 10.79.0.1"),
    ({"addresses": ["10.78.0.2/24", "10.78.0.2/24"]}, InvalidArgument, "given 2 times"),
    ({"interface": "lo"}, InvalidArgument, "the kernel's own"),
    ({"bridge": "uplink"}, FailedPrecondition, "not a bridge"),
    ({"gateway": "", "bridge_address": None, "mtu": 600}, InvalidArgument, "fd78::2/64"),
]


async def test_bad_request_is_one_line_and_changes_nothing(node: NetworkNode, client: Client) -> None:
    ip(node.host, "link", "add", "uplink", "type", "veth", "peer", "downlink")
    made = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    await client.call(api.LINK_ATTACH, attach("web", 9))
    before = shapes(node.host), shapes(made.path), await client.call(api.NETWORK_GET, api.NetworkRequest(id="web"))
    for fields, error, said in BAD:
        request = attach(
            fields.get("id", "web"), 2, **{"interface": "net1", **{k: v for k, v in fields.items() if k != "id"}}
        )
        with pytest.raises(error) as raised:
            await client.call(api.LINK_ATTACH, request)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
        network = await client.call(api.NETWORK_GET, api.NetworkRequest(id="web"))
        assert (shapes(node.host), shapes(made.path), network) == before, fields
    with pytest.raises(NotFound, match="network nobody: not found"):
        await client.call(api.NETWORK_GET, api.NetworkRequest(id="nobody"))
    with pytest.raises(NotFound, match="network nobody: not found"):
        await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="nobody"))
    with pytest.raises(NotFound, match="interface eth7 of network web: not found"):
        await client.call(api.LINK_DETACH, api.DetachLink(id="web", interface="eth7"))
    with pytest.raises(AlreadyExists, match="network web: exists already"):
        await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    assert len(await node.events(client, 2)) == 2


async def test_repeat_of_a_request_gets_the_same_answer(node: NetworkNode, client: Client) -> None:
    made = [await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"), id="c") for _ in range(2)]
    attached = [await client.call(api.LINK_ATTACH, attach("web", 2), id="a") for _ in range(2)]
    assert made[0] == made[1]
    assert attached[0] == attached[1]
    for _ in range(2):
        await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="web"), id="d")
    assert len(await node.events(client, 4)) == 4


async def test_descriptors_and_threads_do_not_grow(node: NetworkNode, client: Client) -> None:
    process = Path(f"/proc/{node.of('network').pid}")

    async def round_trip() -> None:
        await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
        await client.call(api.LINK_ATTACH, attach("web", 2))
        await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="web"))

    await round_trip()
    before = len(list((process / "fd").iterdir()))
    for _ in range(20):
        await round_trip()
    assert len(list((process / "fd").iterdir())) <= before + 2
    assert len(list((process / "task").iterdir())) < 64


async def test_namespace_that_vanished_is_told_and_forgotten(node: NetworkNode, client: Client) -> None:
    made = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    await client.call(api.LINK_ATTACH, attach("web", 2))
    kept = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="kept"))
    await client.call(api.LINK_ATTACH, attach("kept", 3))
    node.of("network").kill()
    subprocess.run(["umount", made.path], check=True)
    Path(made.path).unlink()
    await asyncio.to_thread(node.of("network").start)
    assert [n.id for n in await client.collect(api.NETWORK_LIST, api.ListNetworks())] == ["kept"]
    events = [(e.topic, e.id) for e in await node.events(client, 6)]
    assert events[4:] == [("/networks/detach", "web"), ("/networks/delete", "web")]
    assert ping(kept.path, "10.78.0.1")
    await client.call(api.NETWORK_DELETE, api.NetworkRequest(id="kept"))
    node.assert_nothing_left()


async def test_link_that_vanished_is_told_and_can_be_attached_again(node: NetworkNode, client: Client) -> None:
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    attached = await client.call(api.LINK_ATTACH, attach("web", 2))
    node.of("network").kill()
    ip(node.host, "link", "del", attached.host_interface)
    await asyncio.to_thread(node.of("network").start)
    assert (await client.call(api.NETWORK_GET, api.NetworkRequest(id="web"))).attachments == []
    assert links(node.host) == {}
    made = await client.call(api.LINK_ATTACH, attach("web", 2))
    assert made.host_interface == attached.host_interface


async def test_what_a_restored_database_does_not_know_is_swept(node: NetworkNode, client: Client) -> None:
    kept = await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="kept"))
    assert node.of("network").stop() == 0
    database = node.root / "network"
    shutil.copytree(database, node.directory / "backup")
    await asyncio.to_thread(node.of("network").start)
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
    await client.call(api.LINK_ATTACH, attach("web", 2))
    node.netns.joinpath("shoal-admins-abcdefghijklmn").touch()
    node.of("network").kill()
    shutil.rmtree(database)
    shutil.copytree(node.directory / "backup", database)
    await asyncio.to_thread(node.of("network").start)
    assert {path.name for path in node.netns.iterdir()} == {Path(kept.path).name, "shoal-admins-abcdefghijklmn"}
    assert links(node.host) == {}
    await client.call(api.NETWORK_CREATE, api.CreateNetwork(id="web"))
