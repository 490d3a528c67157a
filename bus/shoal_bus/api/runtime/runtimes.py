"""The OCI runtimes that a node's containers are run by."""

from __future__ import annotations

from shoal_bus.message import Message, Request
from shoal_bus.verb import Verb, behaves


class RuntimeInfoRequest(Request):
    """`runtime` by name on PATH, by absolute path, or by containerd's name for it; empty: the node's default."""

    runtime: str = ""


class RuntimeInfo(Message):
    """`features`: what it says that it can do, as JSON (runtime-spec, features.md); empty where it doesn't."""

    program: str
    version: str = ""
    """The first line that its `--version` prints."""
    features: bytes = b""


RUNTIME_INFO = Verb(
    "runtime",
    "oci_runtime",
    "info",
    RuntimeInfoRequest,
    RuntimeInfo,
    behaviour=behaves("What an OCI runtime of the node is, and can do.", "FAILED_PRECONDITION", whole_node=True),
)
