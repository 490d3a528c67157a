"""Registries: the key that credentials for one are sealed with, and what refers to an image there.

sealed = await seal_credential(client, RegistryCredential(registry="registry.example", user="me", password="…"))
await client.operate(IMAGE_PULL, PullImage(name="registry.example/app", credential=sealed))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from shoal_bus.message import Message, Request
from shoal_bus.sealing import seal
from shoal_bus.types import Descriptor, Digest
from shoal_bus.verb import StreamVerb, Verb, behaves

if TYPE_CHECKING:
    from shoal_bus.client import Client


REGISTRIES = "registries"
"""The directory of links to directories of `hosts.toml` files, below a node's state directory."""


class RegistryCredential(Message):
    """Who one is to a registry. It goes to that registry alone, named as references name it (`docker.io`)."""

    registry: str = Field(min_length=1, max_length=255)
    user: str = Field(default="", repr=False)
    password: str = Field(default="", repr=False)
    identity_token: str = Field(default="", repr=False)
    """Instead of a user and a password: an OAuth 2 refresh token."""
    headers: dict[str, str] = Field(default={}, repr=False)
    """What requests to its hosts carry besides; of these, who one is (`Authorization`, `Cookie`) goes to no mirror."""


class RegistryAccess(Request):
    """How a registry is spoken to, in requests for what has to do with one."""

    plain_http: bool = False
    """Speak HTTP without TLS; loopback registries are spoken to so by themselves."""
    tls: bool = False
    """Speak TLS to a loopback registry, too."""
    credential: bytes = Field(default=b"", max_length=65536, repr=False)
    """One's own credential for the registry (`seal_credential`); empty: the node's."""
    hosts: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,127})?$")
    """Another directory of `hosts.toml` files than the node's: a link to it that somebody (root) has put there, below
    `<state>/registries`. A request names the link and never a path, as with archives."""
    log: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,127})?$")
    """A FIFO in the same place, to which requests and answers are written, but for bodies and who one is."""


class KeyRequest(Request):
    pass


class RegistryKey(Message):
    """The public key (X25519) of the node's content service."""

    public_key: bytes


class ListReferrers(RegistryAccess):
    """What refers to the image that `name` is in its registry; `artifact_type` empty lists all types."""

    name: str = Field(min_length=1, max_length=4096)
    artifact_type: str = Field(default="", max_length=255)


class Referrer(Message):
    """A manifest that names the image as its subject: a signature, an SBOM, an attestation."""

    subject: Digest
    descriptor: Descriptor
    artifact_type: str = ""


async def seal_credential(client: Client, credential: RegistryCredential) -> bytes:
    """A credential for the `credential` field of a request to the client's node: nobody else can read it."""
    key = await client.call(REGISTRY_KEY, KeyRequest())
    return seal(key.public_key, credential.pack())


REGISTRY_KEY = Verb(
    "content",
    "registry",
    "key",
    KeyRequest,
    RegistryKey,
    behaviour=behaves("The key that a credential for a registry is sealed with on its way to this node."),
)
REFERRER_LIST = StreamVerb(
    "content",
    "image",
    "referrers",
    ListReferrers,
    Referrer,
    behaviour=behaves(
        "The manifests in an image's registry that refer to it.",
        "NOT_FOUND",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "FAILED_PRECONDITION",
        "UNAVAILABLE",
    ),
)
