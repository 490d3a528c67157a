"""`gateway`: what speaks containerd's API for a node. It owns nothing; this says that it is there, and where."""

from __future__ import annotations

from shoal_bus.message import Message, Request
from shoal_bus.verb import Verb, behaves


class NodeInfoRequest(Request):
    pass


class NodeInfo(Message):
    """One copy of a node's gateway, and the host it runs on."""

    node: str
    version: str
    pid: int
    address: str
    """The path of its Unix socket."""
    http: str = ""
    root: str
    state: str
    kernel: str
    architecture: str


NODE_INFO = Verb(
    "gateway",
    "node",
    "info",
    NodeInfoRequest,
    NodeInfo,
    behaviour=behaves("The node's version, host and places, told by a copy of its gateway.", whole_node=True),
)
