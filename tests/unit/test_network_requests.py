"""What is refused before the kernel is asked, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from shoal_bus.api.network import AttachLink, CreateNetwork, DetachLink, Route
from shoal_bus.errors import InvalidArgument
from shoal_bus.message import Message, pack
from shoal_network.requests import check

BAD: list[tuple[type[Message], dict[str, Any], str]] = [
    (CreateNetwork, {"id": ""}, "empty"),
    (CreateNetwork, {"id": "../../etc"}, "letters and digits"),
    (CreateNetwork, {"id": "a/b"}, "letters and digits"),
    (CreateNetwork, {"id": "x" * 77}, "at most 76"),
    (CreateNetwork, {"id": "a", "labels": {"k": 1}}, "labels"),
    (DetachLink, {"id": "a", "interface": "a/b"}, "interface"),
    (AttachLink, {"id": "a", "interface": "x" * 16}, "interface"),
    (AttachLink, {"id": "a", "interface": ""}, "interface"),
    (AttachLink, {"id": "a", "interface": ".."}, "interface"),
    (AttachLink, {"id": "a", "bridge": "a:b"}, "bridge"),
    (AttachLink, {"id": "a", "addresses": ["10.0.0.2"]}, "needs its prefix length"),
    (AttachLink, {"id": "a", "addresses": ["10.0.0.2/33"]}, "10.0.0.2/33"),
    (AttachLink, {"id": "a", "addresses": ["10.0.0.256/24"]}, "10.0.0.256"),
    (AttachLink, {"id": "a", "addresses": ["0.0.0.0/24"]}, "no address that an interface can have"),
    (AttachLink, {"id": "a", "addresses": ["224.0.0.1/24"]}, "no address that an interface can have"),
    (AttachLink, {"id": "a", "addresses": ["fe80::1%eth0/64"]}, "leave the scope out"),
    (AttachLink, {"id": "a", "bridge_address": "shoal/24"}, "shoal"),
    (AttachLink, {"id": "a", "gateway": "10.0.0.1/24"}, "10.0.0.1/24"),
    (AttachLink, {"id": "a", "gateway": "fe80::1%eth0"}, "leave the scope out"),
    (AttachLink, {"id": "a", "routes": [{"destination": "10.0.0.1/8"}]}, "host bits"),
    (AttachLink, {"id": "a", "mac": "02:00:00:00:00"}, "six pairs"),
    (AttachLink, {"id": "a", "mac": "02:00:00:00:00:zz"}, "six pairs"),
    (AttachLink, {"id": "a", "mac": "01:00:5e:00:00:01"}, "multicast"),
    (AttachLink, {"id": "a", "mac": "00:00:00:00:00:00"}, "no address that an interface can have"),
    (AttachLink, {"id": "a", "mtu": 67}, "68 to 65535"),
    (AttachLink, {"id": "a", "mtu": 65536}, "68 to 65535"),
]


@pytest.mark.parametrize(("model", "fields", "said"), BAD, ids=[f"{m.__name__}-{said}" for m, _, said in BAD])
def test_field_that_cannot_be_is_invalid_argument(model: type[Message], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as raised:
        model.unpack(pack(fields))
    assert "\n" not in str(raised.value)


TWICE = ["10.0.0.2/24", "10.0.0.2/16"]
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"interface": "lo"}, "the kernel's own"),
    ({"bridge": "all"}, "the kernel's own"),
    ({"addresses": ["10.0.0.2/24"], "gateway": "10.0.1.1"}, "not within any of the addresses 10.0.0.2/24"),
    ({"gateway": "10.0.0.1"}, r"\(none\)"),
    ({"addresses": ["10.0.0.2/24"], "gateway": "fd00::1"}, "not within any"),
    ({"addresses": ["10.0.0.2/24"], "routes": [Route(destination="fd00::/8", gateway="10.0.0.1")]}, "other IPv6"),
    ({"addresses": TWICE}, "address 10.0.0.2: given 2 times"),
    ({"addresses": ["10.0.0.2/24"], "gateway": "10.0.0.1", "routes": [Route(gateway="10.0.0.3")]}, "given 2 times"),
]


@pytest.mark.parametrize(("fields", "said"), IMPOSSIBLE, ids=[said for _, said in IMPOSSIBLE])
def test_request_that_contradicts_itself_is_invalid_argument(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        check(AttachLink(id="a", **fields))


def test_direct_routes_come_before_those_that_need_them() -> None:
    routes = [Route(destination="10.9.0.0/16", gateway="10.1.0.1"), Route(destination="10.1.0.1/32")]
    asked = AttachLink(id="a", addresses=["10.0.0.2/24"], gateway="10.0.0.1", routes=routes)
    assert [route.destination for route in check(asked)] == ["10.1.0.1/32", "10.9.0.0/16", "0.0.0.0/0"]


def test_addresses_are_kept_in_their_one_spelling() -> None:
    asked = AttachLink(id="a", addresses=["FD00:0::0002/64"], mac="02:AA:bb:00:00:01", gateway="FD00::1")
    assert (asked.addresses, asked.mac, asked.gateway) == (["fd00::2/64"], "02:aa:bb:00:00:01", "fd00::1")
