"""Network namespaces for tests: one to play the host in, what is in them, whether packets pass; and a node with one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from shoal_bus.client import Client
from shoal_bus.consumer import read_events
from shoal_bus.events import Event
from shoal_network.netns import run_in

from tests.support.natsd import NatsServer
from tests.support.node import TestNode


@contextmanager
def host_netns(path: Path) -> Iterator[Path]:
    """A network namespace on the file `path`, loopback up; gone at the end of the block."""
    path.touch()
    subprocess.run(["unshare", f"--net={path}", "ip", "link", "set", "lo", "up"], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
        path.unlink()


def ip(netns: Path | str, *arguments: str) -> str:
    """What `ip` prints in a namespace."""
    command = ["nsenter", f"--net={netns}", "ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def links(netns: Path | str) -> dict[str, dict[str, Any]]:
    """The links of a namespace by name, loopback apart, as `ip -json -details address` has them."""
    found = json.loads(ip(netns, "-json", "-details", "address") or "[]")
    return {link["ifname"]: link for link in found if link["ifname"] != "lo"}


def addresses(link: dict[str, Any]) -> list[str]:
    """Its addresses with their prefix lengths, those that the kernel gave it apart."""
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] != "link"]


def mounts_below(directory: Path) -> list[str]:
    """Mount points at `directory` and below it."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point == str(directory) or point.startswith(f"{directory}/")]


@contextmanager
def no_mounts_left(directory: Path) -> Iterator[None]:
    """Fails where the block leaves a mount below `directory`, and takes it away in any case."""
    try:
        yield
        assert mounts_below(directory) == []
    finally:
        for point in reversed(mounts_below(directory)):
            subprocess.run(["umount", "--lazy", point], check=True)


def ping(netns: Path | str, address: str, *, seconds: float = 3.0) -> bool:
    """Whether an ICMP echo request from within a namespace is answered within so many seconds."""
    return run_in(Path(netns), lambda: _ping(address, seconds))


def _ping(address: str, seconds: float) -> bool:
    version = ip_address(address).version
    family, protocol, ask, answer = (
        (socket.AF_INET, socket.IPPROTO_ICMP, 8, 0)
        if version == 4
        else (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129)
    )
    ident = int.from_bytes(os.urandom(2), "big")
    deadline = time.monotonic() + seconds
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.settimeout(0.2)
        while time.monotonic() < deadline:
            packet = struct.pack("!BBHHH", ask, 0, 0, ident, 1)
            packet = struct.pack("!BBHHH", ask, 0, _checksum(packet), ident, 1)
            try:
                raw.sendto(packet, (address, 0))
                data = raw.recv(1500)
            except TimeoutError:
                continue
            except OSError:  # no route, or nobody there
                return False
            message = data[(data[0] & 15) * 4 :] if version == 4 else data
            if message[0] == answer and struct.unpack("!H", message[4:6])[0] == ident:
                return True
    return False


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class NetworkNode(TestNode):
    """A node whose network service has a namespace of the test's own as its host, and a directory of the test's own."""

    __test__ = False

    def __init__(self, directory: Path, natsd: NatsServer) -> None:
        super().__init__(directory, natsd)
        self.host, self.netns = directory / "host", directory / "netns"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(no_mounts_left(self.host))
            stack.enter_context(host_netns(self.host))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for path in reversed(mounts_below(self.netns)):
            subprocess.run(["umount", "--lazy", path], check=True)
        self._stack.__exit__(*raised)

    def start_copy(self) -> None:
        """Starts a further copy of the network service."""
        self.start("network", arguments=("--netns-dir", str(self.netns), "--host-netns", str(self.host)))

    def assert_nothing_left(self) -> None:
        """No link in the host's namespace, no network namespace, no mount of the directory, no directory."""
        assert links(self.host) == {}
        assert mounts_below(self.netns) == []
        assert not self.netns.exists()

    async def events(self, client: Client, enough: int) -> list[Event]:
        """All events so far, once there are `enough` of them and no more come."""
        events: list[Event] = []
        for _ in range(100):
            before = len(events)
            events = [received.event async for received in read_events(client.connection, start=1, follow=False)]
            if before == len(events) >= enough:
                break
            await asyncio.sleep(0.2)
        return events
