"""A registry, as one end of a transfer: what its client says of how it is spoken to, and who the client is to it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass

from shoal_bus import image_reference
from shoal_bus.api import content
from shoal_bus.errors import DeadlineExceeded, Unauthenticated, Unimplemented
from shoal_bus.sealing import seal

from shoal_gateway.call import Call
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import (
    CREDENTIALS,
    HEADER,
    NONE,
    REFRESH,
    AuthRequest,
    AuthResponse,
    OCIRegistry,
)
from shoal_gateway.streams import Stream
from shoal_gateway.typeurls import message_of

_AUTH_SECONDS = 120.0
"""A client may have to ask somebody."""
_HUB = {"docker.io": "registry-1.docker.io"}
"""What clients know a registry's host as, where it isn't what references say."""


@dataclass(frozen=True)
class Registry:
    """The reference, and how its registry is spoken to."""

    reference: str
    plain_http: bool
    auth: Stream | None

    def __str__(self) -> str:
        return f"OCI Registry ({self.reference})"

    async def credential(self, call: Call) -> bytes:
        """Whoever the client is to the registry, sealed for the content service; empty where it has nothing to say.

        It is asked once, before anything else. UNAUTHENTICATED when it goes without an answer.
        """
        if self.auth is None:
            return b""
        domain = image_reference.parse(self.reference).domain
        self.auth.send(AuthRequest(host=_HUB.get(domain, domain), reference=self.reference))
        try:
            async with asyncio.timeout(_AUTH_SECONDS):
                answer = await self.auth.receive()
        except TimeoutError:
            raise DeadlineExceeded(f"{self}: no answer to the question for its credential") from None
        if answer is None:
            raise Unauthenticated(f"{self}: the client doesn't answer the question for its credential")
        credential = _credential(domain, message_of(answer, AuthResponse, "the registry's credential"))
        if credential is None:
            return b""
        key = await call.ask(content.REGISTRY_KEY, content.KeyRequest())
        return seal(key.public_key, credential.pack())


def registry(end: OCIRegistry, auth: Stream | None) -> Registry:
    """The registry that a client means. UNIMPLEMENTED for what a node's own configuration has to say instead."""
    image_reference.parse(end.reference)
    if end.resolver.host_dir:
        raise Unimplemented(
            f"registry hosts of {end.resolver.host_dir}: the node has a directory of its own",
            hint="start it with that one as --registry-config",
        )
    if end.resolver.headers:
        raise Unimplemented(
            f"headers {', '.join(sorted(end.resolver.headers))}: can't be added to a registry's requests"
        )
    return Registry(end.reference, end.resolver.default_scheme == "http", auth)


def _credential(domain: str, answer: AuthResponse) -> content.RegistryCredential | None:
    """The answer, as the bus has it; None for one that says nothing. No error has any of it."""
    if answer.authType == NONE or not answer.secret:
        return None
    if answer.authType == CREDENTIALS:
        return content.RegistryCredential(registry=domain, user=answer.username, password=answer.secret)
    if answer.authType == REFRESH:
        return content.RegistryCredential(registry=domain, identity_token=answer.secret)
    if answer.authType == HEADER and answer.secret.lower().startswith("basic "):
        try:
            user, _, password = base64.b64decode(answer.secret[6:], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            user, password = "", ""
        if user:
            return content.RegistryCredential(registry=domain, user=user, password=password)
    raise Unimplemented("a registry's credential: must be a user and a password, or a refresh token")
