"""Both sides by the same API, each on its own Unix socket: containerd, and shoal's gateway."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from bench.support import containerd, messages, shoal, world
from bench.support.scratch import Scratch

_PROBE = Path(__file__).with_name("probe.py")


class Gateway(containerd.Containerd):
    """shoal by its gateway, by the very client that containerd has."""

    name = "shoal"

    def __init__(
        self, behind: shoal.Shoal, channel: grpc.aio.Channel, protocol: dict[str, ModuleType], mark: str
    ) -> None:
        super().__init__(behind.node, channel, protocol, mark, behind.parent)
        self.behind, self.template = behind, behind.template

    def supervisors(self) -> list[int]:
        return self.behind.supervisors()

    def services(self) -> list[int]:
        return self.behind.services()

    def bus(self) -> list[int]:
        return self.behind.bus()


@dataclass
class Sockets:
    """What the measurements work with."""

    scratch: Scratch
    containerd: containerd.Containerd
    shoal: Gateway
    reference: str
    """The image, which both sides have."""
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    """Mean milliseconds of each step of what was measured, by the measurement."""
    notes: list[str] = field(default_factory=list)

    @property
    def sides(self) -> tuple[containerd.Containerd, Gateway]:
        return self.containerd, self.shoal


@asynccontextmanager
async def opened(scratch: Scratch) -> AsyncIterator[Sockets]:
    """Both sides running until the block is left."""
    async with world.opened(scratch) as both:
        protocol = messages.generate(scratch.directory / "proto")
        async with grpc.aio.insecure_channel(f"unix:{both.shoal.node.address}") as channel:
            gateway = Gateway(both.shoal, channel, protocol, scratch.mark)
            yield Sockets(scratch, both.containerd, gateway, both.reference)


class Probe:
    """`probe.py` under way: the client, in a process of its own, of one side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, name: str, *arguments: Any) -> Any:
        """The result of one of its measurements."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"probe: {name} failed")
        return json.loads(answer)


@contextmanager
def probing(side: containerd.Containerd) -> Iterator[Probe]:
    """The probe of one side, for a block."""
    command = [sys.executable, str(_PROBE), str(side.daemon.address), side.namespace]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Probe(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        process.wait()
