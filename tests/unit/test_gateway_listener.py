"""The gateway's socket: its place, its mode, and who has it."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import pytest
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_gateway.http import parse_address
from shoal_gateway.listener import Listener, alive


def listen(listener: Listener) -> socket.socket:
    with listener.binding() as address:
        server = socket.socket(socket.AF_UNIX)
        server.bind(address.removeprefix("unix:"))
        server.listen()
    return server


async def test_the_socket_is_roots_alone_from_its_first_moment(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "a.sock")
    with listen(listener):
        assert stat.S_IMODE(listener.own.stat().st_mode) == 0o660
        async with listener.published():
            assert stat.S_IMODE(listener.path.stat().st_mode) == 0o660
            assert alive(listener.path)
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_copy_left_is_replaced_and_swept(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    for name in (path, Listener(path).own.with_suffix(".1")):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(name))
    listener = Listener(path)
    with listen(listener):
        async with listener.published():
            assert alive(path)
            assert sorted(path.name for path in tmp_path.iterdir()) == [listener.own.name, "a.sock"]


async def test_a_path_whose_holder_is_gone_is_taken_over(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "a.sock")
    with listen(listener):
        async with listener.published():
            listener.path.unlink()
            async with asyncio.timeout(10):
                while not alive(listener.path):
                    await asyncio.sleep(0.05)


async def test_a_copy_that_stops_leaves_the_path_to_the_one_that_has_it(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "a.sock")
    with listen(listener), socket.socket(socket.AF_UNIX) as other:
        async with listener.published():
            beside = tmp_path / "other"
            other.bind(str(beside))
            other.listen()
            beside.rename(listener.path)
        assert alive(listener.path)


def test_a_file_in_the_sockets_place_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.sock").write_text("precious")
    with pytest.raises(FailedPrecondition, match="isn't a socket"), Listener(tmp_path / "a.sock").binding():
        pass
    assert (tmp_path / "a.sock").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        Listener(tmp_path / ("x" * 100))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [(":9180", ("127.0.0.1", 9180)), ("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:80", ("::1", 80))],
)
def test_http_is_on_loopback_unless_a_host_is_named(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["", "localhost", "a:b", "host:99999", "u@h:80", "h:80/x"])
def test_an_address_without_a_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)
