"""What the resolvers of one service share: the configuration's place, the tokens, the key of sealed credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from shoal_bus import image_reference as reference
from shoal_bus.api.content import KeyRequest, ListReferrers, Referrer, RegistryAccess, RegistryCredential, RegistryKey
from shoal_bus.context import Context
from shoal_bus.errors import InvalidArgument, NotFound
from shoal_bus.image_reference import Reference
from shoal_bus.sealing import private_key, public_key, unseal

from shoal_content.registry.credentials import Credential
from shoal_content.registry.hosts import check_headers
from shoal_content.registry.http import HttpResolver
from shoal_content.registry.resolver import Resolver
from shoal_content.registry.tokens import Tokens
from shoal_content.registry.transport import Waiting


class Registries:
    """The registries of the world, as one node speaks to them."""

    def __init__(self, directory: Path, key: Path, links: Path) -> None:
        """`directory` has the `hosts.toml` files, and `links` those to others, which callers may name."""
        self._directory, self._key, self._links = directory, private_key(key), links
        self._tokens = Tokens()

    # -------------------------------------------------------------------------------------------------------- handlers

    async def key(self, ctx: Context, request: KeyRequest) -> RegistryKey:
        """What credentials are sealed with on their way here."""
        return RegistryKey(public_key=public_key(self._key))

    async def referrers(self, ctx: Context, request: ListReferrers) -> AsyncIterator[Referrer]:
        """What refers to the image that a reference names in its registry."""
        wanted = reference.parse(request.name)
        async with self.resolver(wanted, request) as resolver:
            digest = wanted.digest or (await resolver.resolve(wanted))[0].digest
            for one in await resolver.referrers(wanted, digest, request.artifact_type):
                yield Referrer(subject=digest, descriptor=one.descriptor, artifact_type=one.artifact_type)

    # --------------------------------------------------------------------------------------------------------- within

    def resolver(
        self,
        wanted: Reference,
        access: RegistryAccess,
        *,
        push: bool = False,
        waiting: Waiting = lambda told: None,
    ) -> Resolver:
        """A resolver for one pull or push. INVALID_ARGUMENT for a credential that isn't for this registry, NOT_FOUND
        for a directory that nobody has linked."""
        if access.plain_http and access.tls:
            raise InvalidArgument(f"{wanted}: plain HTTP and TLS at once")
        given = self._unsealed(wanted, access.credential) if access.credential else None
        who = Credential(given.user, given.password, given.identity_token) if given is not None else Credential()
        return HttpResolver(
            wanted,
            plain_http=access.plain_http,
            tls=access.tls,
            push=push,
            directory=self._linked(access.hosts) if access.hosts else self._directory,
            credential=who if who.user or who.password or who.identity_token else None,
            headers=given.headers if given is not None else None,
            tokens=self._tokens,
            waiting=waiting,
            log=self._links / access.log if access.log else None,
        )

    def _linked(self, name: str) -> Path:
        place = self._links / name
        if not place.is_symlink():
            raise NotFound(f"registry hosts {name}: aren't in {self._links}", hint="link their directory there")
        return place

    def _unsealed(self, wanted: Reference, sealed: bytes) -> RegistryCredential:
        given = RegistryCredential.unpack(unseal(self._key, sealed))
        # Who sees the sealed bytes must not be able to have them sent to a registry of his own.
        if given.registry != wanted.domain:
            raise InvalidArgument(f"{wanted}: the credential is for another registry, {given.registry[:255]}")
        check_headers(given.headers)
        return given
