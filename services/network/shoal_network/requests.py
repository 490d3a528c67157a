"""What can be said of a request before the kernel is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network

from shoal_bus.api.network import AttachLink, Route
from shoal_bus.errors import InvalidArgument

_KERNELS_OWN = ("all", "default", "lo")


def check(request: AttachLink) -> list[Route]:
    """The routes `request` asks for, direct ones first; INVALID_ARGUMENT where one couldn't work."""
    for what, name in (("interface", request.interface), ("bridge", request.bridge)):
        if name in _KERNELS_OWN:
            raise InvalidArgument(f"{what} {name}: that name is the kernel's own", hint="choose another name")
    routes = list(request.routes)
    if request.gateway:
        everywhere = "0.0.0.0/0" if ip_address(request.gateway).version == 4 else "::/0"
        routes.append(Route(destination=everywhere, gateway=request.gateway))
    routes.sort(key=lambda route: bool(route.gateway))
    _once("address", (str(ip_interface(address).ip) for address in request.addresses))
    _once("route", (route.destination for route in routes))
    reachable = [ip_interface(address).network for address in request.addresses]
    reachable += [ip_network(route.destination) for route in routes if not route.gateway]
    for route in routes:
        if not route.gateway:
            continue
        gateway = ip_address(route.gateway)
        if gateway.version != ip_network(route.destination).version:
            raise InvalidArgument(f"route {route.destination} via {gateway}: one is IPv4, the other IPv6")
        if not gateway.is_link_local and not any(gateway in network for network in reachable):
            raise InvalidArgument(
                f"gateway {gateway}: not within any of the addresses {', '.join(request.addresses) or '(none)'}",
                hint="give an address whose prefix covers it, or a route to it",
            )
    return routes


def _once(what: str, values: Iterable[str]) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise InvalidArgument(f"{what} {value}: given {times} times", hint="give it once")
