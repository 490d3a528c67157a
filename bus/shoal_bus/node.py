"""Where a node keeps its things, and how whoever is on it finds its bus.

`<root>/<service>/` is what outlives a reboot, `<state>/<service>/` what doesn't. `shoal up` leaves `<state>/node.json`,
readable by root alone, with the address of its bus and the credential.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ValidationError

from shoal_bus.connection import Address
from shoal_bus.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from shoal_bus.subjects import check_node

DEFAULT_ROOT = Path("/var/lib/shoal")
DEFAULT_STATE = Path("/run/shoal")
NODE_FILE = "node.json"


class Node(BaseModel):
    """One node: its name, its places, its bus, and its defaults."""

    name: str
    root: Path = DEFAULT_ROOT
    state: Path = DEFAULT_STATE
    address: Address
    runtime: str = "runc"
    """The OCI runtime of containers that don't name one."""
    domain: str = ""
    """The JetStream domain events are published to, where there is one."""

    def root_of(self, service: str) -> Path:
        """Where a service keeps what outlives a reboot; made if need be, for root alone."""
        return _private(self.root / service)

    def state_of(self, service: str) -> Path:
        """Where a service keeps sockets, bundles and locks; made if need be, for root alone."""
        return _private(self.state / service)

    def save(self) -> Path:
        """Leaves `node.json` in the state directory, for root alone."""
        path = _private(self.state) / NODE_FILE
        beside = path.with_suffix(f".{os.getpid()}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(self.model_dump_json(indent=1))
        beside.rename(path)
        return path


def load(state: Path) -> Node:
    """The node `shoal up` left in `state`. UNAVAILABLE when there is none, PERMISSION_DENIED to others than root."""
    path = state / NODE_FILE
    try:
        return Node.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        raise Unavailable(
            f"no node is up here ({path} isn't there)", hint="start one with `shoal up`, or give --nats-url"
        ) from None
    except PermissionError:
        raise PermissionDenied(f"{path}: only root may use this node", hint="run as root, or give --nats-url") from None
    except (ValueError, ValidationError):
        raise FailedPrecondition(f"{path}: not a node's description", hint="start the node again") from None


def find(
    *, nats_url: str = "", state: Path | None = None, name: str = "", root: Path | None = None, runtime: str = ""
) -> Node:
    """The node that flags and environment describe: a bus of one's own by `nats_url`, or what `up` left in `state`."""
    nats_url = nats_url or os.environ.get("SHOAL_NATS_URL", "")
    state = state or Path(os.environ.get("SHOAL_STATE", "") or DEFAULT_STATE)
    if not nats_url:
        node = load(state)
        if name:
            node.name = check_node(name)
        return node
    node = Node(name=check_node(name) if name else default_name(), state=state, address=parse_url(nats_url))
    node.root = root or Path(os.environ.get("SHOAL_ROOT", "") or DEFAULT_ROOT)
    node.runtime = runtime or node.runtime
    return node


def parse_url(url: str) -> Address:
    """A NATS URL (`nats://user:password@host:4222`, several by comma) as an address, the credential taken out."""
    urls, user, password = [], "", ""
    for one in url.split(","):
        parts = urlsplit(one if "://" in one else f"nats://{one}")
        if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
            raise InvalidArgument(f"--nats-url {parts.hostname or one!r}: must be nats://[user:password@]host[:port]")
        user, password = unquote(parts.username or user), unquote(parts.password or password)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        urls.append(f"{parts.scheme}://{host}:{parts.port or 4222}")
    creds, nkey = os.environ.get("SHOAL_NATS_CREDS", ""), os.environ.get("SHOAL_NATS_NKEY", "")
    return Address(urls=urls, user=user, password=password, creds=creds, nkey=nkey)


def default_name() -> str:
    """This host's name as a node name: SHOAL_NODE, or the hostname with what can't be in one replaced by `-`."""
    if given := os.environ.get("SHOAL_NODE", ""):
        return check_node(given)
    name = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in socket.gethostname().lower())
    return name[:63] or "node"


def _private(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
