"""`services/network`: network namespaces that last, and what is attached to them. Useful without containers."""

from __future__ import annotations

from datetime import datetime
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_address, ip_interface, ip_network
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from shoal_bus.events import Topic
from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Filter, Labels
from shoal_bus.verb import StreamVerb, Verb, behaves

IpInterface = IPv4Interface | IPv6Interface
IpNetwork = IPv4Network | IPv6Network


def _check_interface(value: str) -> str:
    if "/" not in value:
        raise ValueError(f"{value!r}: an address needs its prefix length, as 10.88.0.2/24")
    found = ip_interface(value)
    if "%" in value:
        raise ValueError(f"{value!r}: the interface says which link it is, leave the scope out")
    if found.ip.is_unspecified or found.ip.is_multicast:
        raise ValueError(f"{value!r}: is no address that an interface can have")
    return str(found)


def _check_network(value: str) -> str:
    return str(ip_network("0.0.0.0/0" if value == "default" else value))


def _check_address(value: str) -> str:
    if "%" in value:
        raise ValueError(f"{value!r}: the interface says which link it is, leave the scope out")
    return str(ip_address(value)) if value else ""


def _check_mac(value: str) -> str:
    octets = value.lower().split(":")
    if not value:
        return ""
    if len(octets) != 6 or not all(len(o) == 2 and set(o) <= set("0123456789abcdef") for o in octets):
        raise ValueError(f"{value!r}: a MAC address is six pairs of hexadecimal digits, as 02:42:ac:11:00:02")
    if int(octets[0], 16) & 1:
        raise ValueError(f"{value!r}: is a multicast address")
    if not any(int(octet, 16) for octet in octets):
        raise ValueError(f"{value!r}: is no address that an interface can have")
    return ":".join(octets)


def _check_mtu(value: int) -> int:
    if value and not 68 <= value <= 65535:
        raise ValueError(f"{value}: an MTU is 68 to 65535, or 0 for the default")
    return value


Address = Annotated[str, AfterValidator(_check_address)]
"""An address without a prefix length, as `10.88.0.1`; empty for none."""
Mac = Annotated[str, AfterValidator(_check_mac)]
Mtu = Annotated[int, AfterValidator(_check_mtu)]
Cidr = Annotated[str, AfterValidator(_check_interface)]
"""An address with its prefix length, as `10.88.0.2/24`."""
Destination = Annotated[str, AfterValidator(_check_network)]
LinkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]


class NetworkRequest(Request):
    id: Identifier


class CreateNetwork(Request):
    """A network namespace, with loopback up."""

    id: Identifier
    labels: Labels = {}


class Route(Message):
    destination: Destination = "0.0.0.0/0"
    gateway: Address = ""


class AttachLink(Request):
    """A veth pair: one end in the namespace as `interface`, the other in the bridge `bridge`, which is made if need be.

    `gateway` sets the default route; `bridge_address` gives the bridge itself an address.
    """

    id: Identifier
    interface: LinkName = "eth0"
    bridge: LinkName = "shoal0"
    bridge_address: Cidr | None = None
    addresses: list[Cidr] = []
    gateway: Address = ""
    routes: list[Route] = []
    mac: Mac = ""
    mtu: Mtu = 0


class DetachLink(Request):
    id: Identifier
    interface: LinkName = "eth0"


class Attachment(Message):
    interface: str
    kind: Literal["bridge"] = "bridge"
    host_interface: str
    bridge: str
    bridge_address: str = ""
    addresses: list[str] = []
    routes: list[Route] = []
    mac: str
    mtu: int


class Network(Message):
    """A network namespace: `path` is what a container's OCI spec joins."""

    id: str
    path: str
    labels: Labels = {}
    attachments: list[Attachment] = []
    created_at: datetime


class ListNetworks(Filter, Request):
    pass


NETWORK_CREATE = Verb(
    "network",
    "netns",
    "create",
    CreateNetwork,
    Network,
    mutates=True,
    behaviour=behaves("A network namespace that lasts, loopback up.", "ALREADY_EXISTS"),
)
NETWORK_GET = Verb(
    "network",
    "netns",
    "get",
    NetworkRequest,
    Network,
    behaviour=behaves("A network namespace and what is attached.", "NOT_FOUND"),
)
NETWORK_LIST = StreamVerb(
    "network", "netns", "list", ListNetworks, Network, behaviour=behaves("Every network namespace.")
)
NETWORK_DELETE = Verb(
    "network",
    "netns",
    "delete",
    NetworkRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes a network namespace and everything attached to it.", "NOT_FOUND"),
)
LINK_ATTACH = Verb(
    "network",
    "link",
    "attach",
    AttachLink,
    Attachment,
    mutates=True,
    behaviour=behaves(
        "Attaches a network namespace to a bridge.", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"
    ),
)
LINK_DETACH = Verb(
    "network",
    "link",
    "detach",
    DetachLink,
    Empty,
    mutates=True,
    behaviour=behaves("Takes an interface away again.", "NOT_FOUND"),
)


class NetworkEvent(Message):
    """Payload of `/networks/create` and `/networks/delete`."""

    id: str
    path: str = ""


class AttachmentEvent(Message):
    """Payload of `/networks/attach` and `/networks/detach`."""

    id: str
    interface: str
    bridge: str = ""
    addresses: list[str] = []


NETWORKS_CREATE = Topic("network", "/networks/create", NetworkEvent, "id")
NETWORKS_DELETE = Topic("network", "/networks/delete", NetworkEvent, "id")
NETWORKS_ATTACH = Topic("network", "/networks/attach", AttachmentEvent, "id")
NETWORKS_DETACH = Topic("network", "/networks/detach", AttachmentEvent, "id")
