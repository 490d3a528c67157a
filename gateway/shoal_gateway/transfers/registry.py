"""A registry, as one end of a transfer: what its client says of how it is spoken to, and who the client is to it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal_bus import image_reference
from shoal_bus.api import content
from shoal_bus.errors import DeadlineExceeded, InvalidArgument, Unauthenticated, Unimplemented
from shoal_bus.sealing import seal

from shoal_gateway import archives
from shoal_gateway.call import Call
from shoal_gateway.places import place
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import (
    CREDENTIALS,
    HEADER,
    NONE,
    REFRESH,
    AuthRequest,
    AuthResponse,
    OCIRegistry,
)
from shoal_gateway.streams import Sender, Stream
from shoal_gateway.typeurls import message_of

_AUTH_SECONDS = 120.0
"""A client may have to ask somebody."""
_HUB = {"docker.io": "registry-1.docker.io"}
"""What clients know a registry's host as, where it isn't what references say."""
_LOG_SECONDS = 1.0
"""How long a client may take to read the end of what it is shown of requests."""
_SCHEMES = ("", "http", "https")


@dataclass(frozen=True)
class Registry:
    """The reference, and how its registry is spoken to."""

    reference: str
    scheme: str
    headers: Mapping[str, str]
    hosts: str
    """A directory of `hosts.toml` files that counts instead of the node's; empty for that."""
    auth: Stream | None
    log: Stream | None = None
    """Where the client sees what the registry is asked, and answers."""

    def __str__(self) -> str:
        return f"OCI Registry ({self.reference})"

    @asynccontextmanager
    async def access(self, call: Call, state: Path) -> AsyncIterator[content.RegistryAccess]:
        """How the content service speaks to it, for the length of the block. `state` is the node's state directory.

        The client is asked who it is once, before anything else; UNAUTHENTICATED when it goes without an answer.
        """
        async with _told(state, self.log) as log:
            with _linked(state, self.hosts) as link:
                yield content.RegistryAccess(
                    plain_http=self.scheme == "http", tls=self.scheme == "https", hosts=link, log=log,
                    credential=await self._credential(call),
                )  # fmt: skip

    async def _credential(self, call: Call) -> bytes:
        """Whoever the client is to the registry, and its headers, sealed for the content service; empty for neither."""
        domain = image_reference.parse(self.reference).domain
        told = await self._answer(domain) if self.auth is not None else None
        if told is None and not self.headers:
            return b""
        told = told or content.RegistryCredential(registry=domain)
        told = told.model_copy(update={"headers": {**self.headers, **told.headers}})
        key = await call.ask(content.REGISTRY_KEY, content.KeyRequest())
        return seal(key.public_key, told.pack())

    async def _answer(self, domain: str) -> content.RegistryCredential | None:
        assert self.auth is not None
        self.auth.send(AuthRequest(host=_HUB.get(domain, domain), reference=self.reference))
        try:
            async with asyncio.timeout(_AUTH_SECONDS):
                answer = await self.auth.receive()
        except TimeoutError:
            raise DeadlineExceeded(f"{self}: no answer to the question for its credential") from None
        if answer is None:
            raise Unauthenticated(f"{self}: the client doesn't answer the question for its credential")
        return _credential(domain, message_of(answer, AuthResponse, "the registry's credential"))


def registry(end: OCIRegistry, auth: Stream | None, log: Stream | None) -> Registry:
    """The registry that a client means. INVALID_ARGUMENT, UNIMPLEMENTED for what can't be spoken."""
    image_reference.parse(end.reference)
    resolver = end.resolver
    if resolver.default_scheme not in _SCHEMES:
        raise Unimplemented(f"scheme {resolver.default_scheme[:100]!r}: registries are spoken to by http or https")
    if resolver.host_dir and not Path(resolver.host_dir).is_absolute():
        raise InvalidArgument(f"registry hosts of {resolver.host_dir[:1000]!r}: must be an absolute path on the node")
    return Registry(end.reference, resolver.default_scheme, dict(resolver.headers), resolver.host_dir, auth, log)


@asynccontextmanager
async def _told(state: Path, stream: Stream | None) -> AsyncIterator[str]:
    """A FIFO whose bytes go to a client's stream; no name without one."""
    if stream is None:
        yield ""
        return
    with place(state / content.REGISTRIES) as path:
        os.mkfifo(path, 0o600)
        entry = archives.Entry(path)
        draining = asyncio.create_task(entry.drain(Sender(stream).write))
        await asyncio.sleep(0)  # it is open from then on
        try:
            yield path.name
            await asyncio.wait({draining}, timeout=_LOG_SECONDS)
        finally:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            entry.close()


@contextmanager
def _linked(state: Path, directory: str) -> Iterator[str]:
    """A link to a directory of `hosts.toml` files, by which the content service finds it; no name for none."""
    if not directory:
        yield ""
        return
    with place(state / content.REGISTRIES) as link:
        link.symlink_to(directory)
        yield link.name


def _credential(domain: str, answer: AuthResponse) -> content.RegistryCredential | None:
    """The answer, as the bus has it; None for one that says nothing. No error has any of it."""
    if answer.authType == NONE or not answer.secret:
        return None
    if answer.authType == CREDENTIALS:
        return content.RegistryCredential(registry=domain, user=answer.username, password=answer.secret)
    if answer.authType == REFRESH:
        return content.RegistryCredential(registry=domain, identity_token=answer.secret)
    if answer.authType == HEADER and not answer.secret.lower().startswith("basic "):
        return content.RegistryCredential(registry=domain, headers={"Authorization": answer.secret})
    if answer.authType == HEADER:
        try:
            user, _, password = base64.b64decode(answer.secret[6:], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            user, password = "", ""
        if user:
            return content.RegistryCredential(registry=domain, user=user, password=password)
    raise Unimplemented("a registry's credential: must be a user and a password, a refresh token or a whole header")
