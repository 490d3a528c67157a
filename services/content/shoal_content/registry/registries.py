"""What the resolvers of one service share: the configuration's place, the tokens, the key of sealed credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from shoal_bus import image_reference as reference
from shoal_bus.api.content import KeyRequest, ListReferrers, Referrer, RegistryCredential, RegistryKey
from shoal_bus.context import Context
from shoal_bus.errors import InvalidArgument
from shoal_bus.image_reference import Reference
from shoal_bus.sealing import private_key, public_key, unseal

from shoal_content.registry.credentials import Credential
from shoal_content.registry.http import HttpResolver
from shoal_content.registry.resolver import Resolver
from shoal_content.registry.tokens import Tokens
from shoal_content.registry.transport import Waiting


class Registries:
    """The registries of the world, as one node speaks to them."""

    def __init__(self, directory: Path, key: Path) -> None:
        self._directory, self._key = directory, private_key(key)
        self._tokens = Tokens()

    # -------------------------------------------------------------------------------------------------------- handlers

    async def key(self, ctx: Context, request: KeyRequest) -> RegistryKey:
        """What credentials are sealed with on their way here."""
        return RegistryKey(public_key=public_key(self._key))

    async def referrers(self, ctx: Context, request: ListReferrers) -> AsyncIterator[Referrer]:
        """What refers to the image that a reference names in its registry."""
        wanted = reference.parse(request.name)
        async with self.resolver(wanted, plain_http=request.plain_http, sealed=request.credential) as resolver:
            digest = wanted.digest or (await resolver.resolve(wanted))[0].digest
            for one in await resolver.referrers(wanted, digest, request.artifact_type):
                yield Referrer(subject=digest, descriptor=one.descriptor, artifact_type=one.artifact_type)

    # --------------------------------------------------------------------------------------------------------- within

    def resolver(
        self,
        wanted: Reference,
        *,
        plain_http: bool = False,
        sealed: bytes = b"",
        push: bool = False,
        waiting: Waiting = lambda told: None,
    ) -> Resolver:
        """A resolver for one pull or push. INVALID_ARGUMENT for a credential that isn't for this registry."""
        return HttpResolver(
            wanted,
            plain_http=plain_http,
            push=push,
            directory=self._directory,
            credential=self._unsealed(wanted, sealed) if sealed else None,
            tokens=self._tokens,
            waiting=waiting,
        )

    def _unsealed(self, wanted: Reference, sealed: bytes) -> Credential:
        given = RegistryCredential.unpack(unseal(self._key, sealed))
        # Who sees the sealed bytes must not be able to have them sent to a registry of his own.
        if given.registry != wanted.domain:
            raise InvalidArgument(f"{wanted}: the credential is for another registry, {given.registry[:255]}")
        return Credential(given.user, given.password, given.identity_token)
