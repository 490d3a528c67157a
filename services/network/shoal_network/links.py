"""The bridge driver: a veth pair between a network namespace and a bridge, over rtnetlink.

A bridge that shoal makes carries the alias `shoal` (`ip -d link`), and goes with its last port. It is made under a
name of its own, marked, and only then given the name asked for: a killed attempt can't leave one that nobody owns.
Bridges are made and removed with the host's namespace held, so that a bridge of shoal's without a port is nobody's.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from shoal_bus.api.network import AttachLink, Attachment, Route
from shoal_bus.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

from shoal_network.driver import Driver
from shoal_network.errors import refused
from shoal_network.netns import exclusive, run_in
from shoal_network.requests import check

ALIAS = "shoal"
IFA_F_NODAD = 0x02
_TEMPORARY = "shbr-"
_ATTEMPTS = 5

T = TypeVar("T")


class BridgeDriver(Driver):
    """`host` is the namespace of the bridges and of the host's ends; None is this process's own."""

    def __init__(self, host: Path | None = None) -> None:
        self._host = host

    def attach(self, netns: Path, request: AttachLink, host: str) -> Attachment:
        routes = check(request)
        with ExitStack() as undo:
            with exclusive(self._host):
                _within(self._host, lambda ip: _delete(ip, host))  # what a killed attempt left
                undo.callback(self._undo, host, request.bridge)
                bridge, added = _within(self._host, lambda ip: _prepare(ip, request))
                if added:
                    undo.callback(_within, self._host, lambda ip: _drop_address(ip, request.bridge, added))
                _within(self._host, lambda ip: _plug(ip, netns, request, host, bridge))
            mac, mtu = _within(netns, lambda ip: _configure(ip, request, routes))
            undo.pop_all()
        return Attachment(
            interface=request.interface, host_interface=host, bridge=request.bridge,
            bridge_address=request.bridge_address or "",
            addresses=request.addresses, routes=routes, mac=mac, mtu=mtu,
        )  # fmt: skip

    def unplug(self, host: str) -> None:
        # The kernel waits until nobody reads the device any more: tens of milliseconds, and nothing to hold a lock for.
        _within(self._host, lambda ip: _delete(ip, host))

    def detach(self, attachment: Attachment, *, drop_address: bool = False) -> None:
        address = attachment.bridge_address if drop_address else ""
        self._undo(attachment.host_interface, attachment.bridge, address)

    def _undo(self, host: str, bridge: str, address: str = "") -> None:
        def release(ip: Any) -> None:
            if address:
                _drop_address(ip, bridge, address)
            _release(ip, bridge)

        self.unplug(host)
        with exclusive(self._host):
            _within(self._host, release)

    def sweep(self, prefix: str, keep: Collection[str]) -> list[str]:
        def find(ip: Any) -> list[str]:
            links = {str(link.get_attr("IFLA_IFNAME")): _kind(link) for link in ip.get_links()}
            strays = [name for name, kind in links.items() if kind == "veth" and name.startswith(prefix)]
            strays = [name for name in strays if name not in keep]
            for name in strays:
                _delete(ip, name)
            return strays + [name for name, kind in links.items() if kind == "bridge" and _release(ip, name)]

        with exclusive(self._host):
            return _within(self._host, find)

    def present(self, host: str) -> bool:
        return _within(self._host, lambda ip: bool(ip.link_lookup(ifname=host)))

    def has_address(self, bridge: str, address: str) -> bool:
        return _within(self._host, lambda ip: _has_address(ip, bridge, address))


def _within(path: Path | None, work: Callable[[Any], T]) -> T:
    def run() -> T:
        with IPRoute() as ip:
            return work(ip)

    return run_in(path, run)


def _delete(ip: Any, name: str) -> None:
    for index in ip.link_lookup(ifname=name):
        try:
            with refused(f"link {name}"):
                ip.link("del", index=index)
        except Exception:
            if ip.link_lookup(ifname=name):
                raise


def _kind(link: Any) -> str:
    return str(link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "")


def _ensure_bridge(ip: Any, name: str) -> int:
    beside = _TEMPORARY + hashlib.blake2b(name.encode(), digest_size=5).hexdigest()
    _delete(ip, beside)
    for _ in range(_ATTEMPTS):
        if found := ip.link_lookup(ifname=name):
            index = int(found[0])
            link = ip.get_links(index)[0]
            if _kind(link) != "bridge":
                raise FailedPrecondition(f"{name}: is a link already, but not a bridge", hint="choose another name")
            if _is_unused(ip, link):  # its maker may have been killed before this
                with refused(f"bridge {name}"):
                    ip.link("set", index=index, state="up")
            return index
        with refused(f"bridge {name}"):
            # A fixed address: otherwise the bridge's changes with its ports, and neighbours' caches are wrong.
            ip.link("add", ifname=beside, kind="bridge", address=f"02:{os.urandom(5).hex(':')}")
            index = int(ip.link_lookup(ifname=beside)[0])
            ip.link("set", index=index, ifalias=ALIAS)
            try:
                ip.link("set", index=index, ifname=name)
            except NetlinkError as error:
                _delete(ip, beside)
                if error.code != errno.EEXIST:
                    raise
    raise FailedPrecondition(f"bridge {name}: it comes and goes", hint="see who else makes and deletes it")


def _is_unused(ip: Any, link: Any) -> bool:
    """Whether this is a bridge that shoal made, or was about to, without a port."""
    named = str(link.get_attr("IFLA_IFNAME"))
    made = link.get_attr("IFLA_IFALIAS") == ALIAS or named.startswith(_TEMPORARY)
    return made and not ip.link_lookup(master=link["index"])


def _release(ip: Any, name: str) -> bool:
    """Removes a bridge that shoal made, if nothing is plugged into it; says whether it did."""
    for index in ip.link_lookup(ifname=name):
        if _is_unused(ip, ip.get_links(index)[0]):
            _delete(ip, name)
            return True
    return False


def _prepare(ip: Any, request: AttachLink) -> tuple[int, str]:
    """The bridge's index, and its address where this call put it there."""
    index = _ensure_bridge(ip, request.bridge)
    if request.bridge_address is None:
        return index, ""
    address = ip_interface(request.bridge_address)
    try:
        with refused(f"bridge {request.bridge}: address {address}"):
            flags = IFA_F_NODAD if address.version == 6 else 0
            ip.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, flags=flags)
    except AlreadyExists:
        return index, ""
    return index, str(address)


def _has_address(ip: Any, bridge: str, address: str) -> bool:
    wanted = ip_interface(address)
    return any(
        found.get_attr("IFA_ADDRESS") == str(wanted.ip) and found["prefixlen"] == wanted.network.prefixlen
        for index in ip.link_lookup(ifname=bridge)
        for found in ip.get_addr(index=index)
    )


def _drop_address(ip: Any, bridge: str, address: str) -> None:
    wanted = ip_interface(address)
    if not _has_address(ip, bridge, address):
        return
    for index in ip.link_lookup(ifname=bridge):
        with refused(f"bridge {bridge}: address {address}"):
            ip.addr("del", index=index, address=str(wanted.ip), prefixlen=wanted.network.prefixlen)


def _plug(ip: Any, path: Path, request: AttachLink, host: str, bridge: int) -> None:
    peer: dict[str, Any] = {"ifname": request.interface}
    if request.mac:
        peer["address"] = request.mac
    mtu = {"mtu": request.mtu} if request.mtu else {}
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with refused(f"interface {request.interface}"):
            # One message: the far end is born in its namespace, under its name.
            ip.link("add", ifname=host, kind="veth", peer=peer | mtu | {"net_ns_fd": fd}, **mtu)
    except AlreadyExists:
        raise AlreadyExists(f"interface {request.interface}: is there already", hint="choose another name") from None
    finally:
        os.close(fd)
    try:
        with refused(f"bridge {request.bridge}"):
            index = ip.link_lookup(ifname=host)[0]
            ip.link("set", index=index, master=bridge, state="up")
    except (InvalidArgument, NotFound):
        if bridge in ip.link_lookup(ifname=request.bridge):
            raise
        # Not by shoal, which holds the namespace: there is nothing to wait for, and nothing wrong with the request.
        raise Aborted(f"bridge {request.bridge}: was deleted meanwhile", hint="ask again") from None


def _configure(ip: Any, request: AttachLink, routes: list[Route]) -> tuple[str, int]:
    """Addresses, up, routes; then the link's MAC and MTU as the kernel has them."""
    index = ip.link_lookup(ifname=request.interface)[0]
    for text in request.addresses:
        address = ip_interface(text)
        with refused(f"address {text}"):
            # Duplicate address detection would keep it unusable for a second; who gives it vouches for it.
            ip.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen,
                    flags=IFA_F_NODAD if address.version == 6 else 0)  # fmt: skip
    with refused(f"interface {request.interface}"):
        ip.link("set", index=index, state="up")
    for route in routes:
        with refused(f"route {route.destination} via {route.gateway or request.interface}"):
            to = ip_network(route.destination)
            extra = {"gateway": route.gateway} if route.gateway else {"scope": 253 if to.version == 4 else 0}
            ip.route("add", dst=str(to), oif=index, family=2 if to.version == 4 else 10, **extra)
    link = ip.get_links(index)[0]
    return str(link.get_attr("IFLA_ADDRESS")), int(link.get_attr("IFLA_MTU"))
