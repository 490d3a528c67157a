"""The conformance suite of network drivers: each implementation passes all of it, in a kernel of its own namespace."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from shoal_bus.api.network import AttachLink, Attachment, Route
from shoal_bus.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument
from shoal_network import links as links_module
from shoal_network import netns
from shoal_network.driver import Driver
from shoal_network.links import BridgeDriver

from tests.support.netns import addresses, host_netns, ip, links, no_mounts_left, ping

DRIVERS = [BridgeDriver]
BOTH = {"addresses": ["10.77.0.2/24", "fd77::2/64"], "bridge_address": "10.77.0.1/24", "gateway": "10.77.0.1"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    with no_mounts_left(tmp_path), host_netns(tmp_path / "host") as path:
        yield path


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, host: Path) -> Driver:
    made: Driver = request.param(host)
    return made


@pytest.fixture
def pod(tmp_path: Path, host: Path) -> Iterator[Path]:
    path = tmp_path / "netns" / "pod"
    netns.create(path)
    yield path
    netns.remove(path)


@pytest.fixture
def other(tmp_path: Path, host: Path) -> Iterator[Path]:
    path = tmp_path / "netns" / "other"
    netns.create(path)
    yield path
    netns.remove(path)


def end() -> str:
    return f"sh{secrets.token_hex(6)}"


def ask(**fields: Any) -> AttachLink:
    return AttachLink(id="pod", bridge="br-t", **fields)


def test_attached_interface_is_as_asked_for(driver: Driver, host: Path, pod: Path) -> None:
    name = end()
    made = driver.attach(pod, ask(interface="net1", mac="02:00:00:00:77:02", mtu=1400, **BOTH), name)
    (link,) = links(pod).values()
    assert (link["ifname"], link["operstate"], link["mtu"]) == ("net1", "UP", 1400)
    assert link["address"] == made.mac == "02:00:00:00:77:02"
    assert addresses(link) == made.addresses == ["10.77.0.2/24", "fd77::2/64"]
    assert "default via 10.77.0.1 dev net1" in ip(pod, "route")
    assert (made.mtu, made.host_interface, made.kind) == (1400, name, "bridge")
    assert links(host)[name]["master"] == "br-t"
    assert addresses(links(host)["br-t"]) == ["10.77.0.1/24"]
    assert driver.present(name)
    assert driver.has_address("br-t", "10.77.0.1/24")


def test_packets_pass_between_namespaces_and_host(driver: Driver, host: Path, pod: Path, other: Path) -> None:
    driver.attach(pod, ask(**BOTH), end())
    driver.attach(other, ask(addresses=["10.77.0.3/24", "fd77::3/64"], bridge_address="fd77::1/64"), end())
    for address in ("10.77.0.3", "fd77::3", "10.77.0.1", "fd77::1"):
        assert ping(pod, address), address
    assert ping(host, "10.77.0.2")
    assert ping(host, "fd77::3")
    assert not ping(pod, "10.77.0.99", seconds=0.5)


def test_detached_interface_is_gone_with_its_bridge(driver: Driver, host: Path, pod: Path) -> None:
    made = driver.attach(pod, ask(**BOTH), end())
    driver.detach(made, drop_address=True)
    driver.detach(made, drop_address=True)
    assert links(pod) == links(host) == {}
    assert not driver.present(made.host_interface)


def test_unplugged_interface_is_gone_before_its_bridge(driver: Driver, host: Path, pod: Path) -> None:
    made = driver.attach(pod, ask(**BOTH), end())
    for _ in range(2):
        driver.unplug(made.host_interface)
        assert links(pod) == {}
        assert set(links(host)) == {"br-t"}
    driver.detach(made)
    assert links(host) == {}


def test_bridge_stays_as_long_as_somebody_uses_it(driver: Driver, host: Path, pod: Path, other: Path) -> None:
    first = driver.attach(pod, ask(**BOTH), end())
    second = driver.attach(other, ask(addresses=["10.77.0.3/24"]), end())
    driver.detach(first)
    assert set(links(host)) == {"br-t", second.host_interface}
    assert ping(other, "10.77.0.1")
    driver.detach(second)
    assert links(host) == {}


def test_bridge_of_somebody_else_stays_as_it_was(driver: Driver, host: Path, pod: Path) -> None:
    ip(host, "link", "add", "br-t", "type", "bridge")
    ip(host, "address", "add", "10.77.0.1/24", "dev", "br-t")
    before = links(host)["br-t"]
    driver.detach(driver.attach(pod, ask(addresses=["10.77.0.2/24"]), end()))
    after = links(host)["br-t"]
    assert (after["addr_info"], after["flags"]) == (before["addr_info"], before["flags"])


def test_attaching_again_after_a_kill_replaces_what_is_there(driver: Driver, host: Path, pod: Path) -> None:
    name = end()
    driver.attach(pod, ask(**BOTH), name)
    driver.attach(pod, ask(**BOTH), name)
    assert set(links(pod)) == {"eth0"}
    assert ping(host, "10.77.0.2")


def test_bridge_left_down_or_half_made_by_a_kill_is_finished(driver: Driver, host: Path, pod: Path) -> None:
    ip(host, "link", "add", "br-t", "type", "bridge")
    ip(host, "link", "set", "br-t", "alias", "shoal")
    driver.attach(pod, ask(**BOTH), end())
    assert "UP" in links(host)["br-t"]["flags"]
    assert ping(host, "10.77.0.2")


REFUSED: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"addresses": ["10.77.0.2/24"], "gateway": "10.78.0.1"}, InvalidArgument),
    ({"addresses": ["10.77.0.2/24"], "interface": "lo"}, InvalidArgument),
    ({"addresses": ["fd77::2/64"], "mtu": 600}, InvalidArgument),
    ({"interface": "taken"}, AlreadyExists),
    ({"bridge": "uplink"}, FailedPrecondition),
]


@pytest.mark.parametrize(("fields", "error"), REFUSED)
def test_refused_attach_leaves_nothing(
    driver: Driver, host: Path, pod: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    ip(host, "link", "add", "uplink", "type", "veth", "peer", "downlink")
    ip(pod, "link", "add", "taken", "type", "bridge")
    request = AttachLink(**({"id": "pod", "bridge": "br-t", "bridge_address": "10.77.0.1/24"} | fields))
    with pytest.raises(error):
        driver.attach(pod, request, end())
    assert set(links(host)) == {"uplink", "downlink"}
    assert set(links(pod)) == {"taken"}


def test_route_through_a_gateway_behind_a_direct_route(driver: Driver, pod: Path) -> None:
    routes = [Route(destination="10.9.0.0/16", gateway="169.254.1.1"), Route(destination="169.254.1.1/32")]
    driver.attach(pod, ask(addresses=["10.77.0.2/32"], routes=routes), end())
    assert "10.9.0.0/16 via 169.254.1.1 dev eth0" in ip(pod, "route")


def test_ipv6_alone_with_its_default_route(driver: Driver, host: Path, pod: Path) -> None:
    driver.attach(pod, ask(addresses=["fd77::2/64"], bridge_address="fd77::1/64", gateway="fd77::1"), end())
    assert "default via fd77::1 dev eth0" in ip(pod, "-6", "route")
    assert ping(pod, "fd77::1")


def test_sweep_takes_what_is_nobodys_and_nothing_else(driver: Driver, host: Path, pod: Path, other: Path) -> None:
    mine, prefix = end(), "sh"
    kept = driver.attach(pod, ask(interface="net1", addresses=["10.77.0.2/24"]), mine)
    driver.attach(other, AttachLink(id="x", bridge="br-x"), end())
    ip(host, "link", "add", "shbr-0123456789", "type", "bridge")
    ip(host, "link", "add", "admins", "type", "bridge")
    removed = driver.sweep(prefix, {mine})
    assert len(removed) == 3
    assert set(links(host)) == {kept.host_interface, "br-t", "admins"}
    assert driver.sweep(prefix, {mine}) == []


def test_detach_of_what_never_was_is_no_error(driver: Driver, host: Path) -> None:
    never = Attachment(
        interface="eth0", host_interface=end(), bridge="br-t", bridge_address="10.0.0.1/8", mac="", mtu=0
    )
    driver.detach(never, drop_address=True)
    assert links(host) == {}


def test_nodes_that_share_a_host_share_its_bridge(host: Path, tmp_path: Path) -> None:
    """Two nodes have no lock in common, yet neither takes the bridge away while the other plugs into it."""
    pods = [tmp_path / "netns" / f"pod{number}" for number in range(4)]

    def churn(pod: Path) -> None:
        driver, number = BridgeDriver(host), pods.index(pod) + 2
        netns.create(pod)
        try:
            for _ in range(8):
                made = driver.attach(pod, ask(addresses=[f"10.77.0.{number}/24"]), f"sh{number}")
                assert links(host)[made.host_interface]["master"] == "br-t"
                driver.detach(made)
        finally:
            netns.remove(pod)

    with ThreadPoolExecutor() as pool:
        list(pool.map(churn, pods))
    assert links(host) == {}


def test_bridge_deleted_by_somebody_else_in_the_middle_is_aborted(host: Path, pod: Path) -> None:
    def plug() -> None:
        with IPRoute() as route:
            links_module._plug(route, pod, ask(), end(), 4711)  # an index that no link has

    with pytest.raises(Aborted, match="br-t: was deleted meanwhile"):
        netns.run_in(host, plug)
