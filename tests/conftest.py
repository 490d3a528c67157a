"""Fixtures that every test may use: a real nats-server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from shoal_bus.connection import Connection, connect

from tests.support.leaks import Leaks
from tests.support.natsd import NatsServer


def pytest_configure() -> None:
    """Before gRPC is imported: tests fork processes that never use it, and its handlers would speak on their stderr."""
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


@pytest.fixture
def natsd(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server of the test's own."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def connection(natsd: NatsServer) -> AsyncIterator[Connection]:
    """A connection to it."""
    opened = await connect(natsd.address, name="test")
    yield opened
    await opened.close()


@pytest.fixture
def leaks(tmp_path: Path) -> Iterator[Leaks]:
    """Fails the test that leaves mounts, namespaces, links, cgroups or shims behind."""
    taken = Leaks(str(tmp_path))
    yield taken
    taken.check()
