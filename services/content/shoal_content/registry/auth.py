"""What a registry asks for with 401, answered: Basic (RFC 7617), and the distribution project's bearer tokens.

A credential goes to the registry itself, and to the token service that it names; to that one only over TLS, unless the
registry itself is spoken to without, and then off this machine only if the registry is off it, too. Tokens are asked
for with all the scopes that are needed at once, and kept till they expire (`Tokens`).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
from shoal_bus.errors import FailedPrecondition, PermissionDenied, Unauthenticated, Unavailable
from yarl import URL

from shoal_content.registry.credentials import Credential
from shoal_content.registry.hosts import Host, is_loopback
from shoal_content.registry.tokens import Scopes, Tokens, lifetime

_PARAMETER = re.compile(r'([A-Za-z][A-Za-z0-9_-]*)=(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_LONGEST_CHALLENGE = 8192
_MAX_TOKEN_BYTES = 1 << 20
_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=15)
_CLIENT_ID = "shoal"
_BASIC_SECONDS = 3600.0


class Authorizer:
    """The `Authorization` headers for one host of a registry, gotten when they are first asked for."""

    def __init__(
        self, session: aiohttp.ClientSession, host: Host, credential: Credential | None, tokens: Tokens
    ) -> None:
        self._session, self._host, self._credential, self._tokens = session, host, credential, tokens
        self._origin = str(host.url.origin())
        self._lock = asyncio.Lock()

    def header(self, scopes: Scopes) -> str:
        """What to send with a request that needs `scopes`; empty as long as nothing was asked for."""
        return self._tokens.get(self._origin, scopes, self._credential)

    async def answer(self, challenges: Sequence[str], used: str, scopes: Scopes) -> bool:
        """Answers a 401 to a request that carried `used`; says whether it is worth asking again."""
        async with self._lock:
            if self.header(scopes) not in (used, ""):
                return True  # somebody else has got a newer one meanwhile
            for challenge in challenges:
                scheme, _, rest = challenge[:_LONGEST_CHALLENGE].partition(" ")
                if scheme.lower() == "bearer":
                    token, seconds = await self._token(_parameters(rest), scopes)
                    header = f"Bearer {token}"
                elif scheme.lower() == "basic" and self._credential is not None and self._credential.user:
                    header, seconds = self._credential.basic, _BASIC_SECONDS
                else:
                    continue
                if header == used:
                    return False
                self._tokens.put(self._origin, scopes, self._credential, header, seconds)
                return True
            return False

    async def _token(self, parameters: dict[str, str], scopes: Scopes) -> tuple[str, float]:
        if self._credential is not None and self._credential.token:
            return self._credential.token, _BASIC_SECONDS
        realm = self._realm(parameters.get("realm", ""))
        wanted = _merged(scopes, parameters.get("scope", ""))
        try:
            async with self._ask(realm, parameters.get("service", ""), wanted) as response:
                status, body = response.status, await _read(response)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable(
                f"registry {self._host}: its token service {realm.host} doesn't answer ({type(error).__name__})"
            ) from None
        if status in (400, 401):
            raise Unauthenticated(f"registry {self._host}: its token service refused", hint=login(self._host))
        if status == 403:
            raise PermissionDenied(f"registry {self._host}: its token service refused", hint=login(self._host))
        if status != 200:
            raise Unavailable(f"registry {self._host}: its token service answered {status}")
        return self._token_of(body)

    def _ask(
        self, realm: URL, service: str, scopes: Sequence[str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        credential, tls = self._credential, self._host.tls_for(realm)
        if credential is not None and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token, "client_id": _CLIENT_ID}
            form |= {"service": service, "scope": " ".join(scopes)}
            return self._session.post(realm, data=form, allow_redirects=False, ssl=tls, timeout=_TIMEOUT)
        asked = [*realm.query.items(), *(("service", one) for one in (service,) if one)]
        asked += [("scope", one) for one in scopes]
        headers = {"Authorization": credential.basic} if credential is not None else {}
        return self._session.get(
            realm.with_query(asked), headers=headers, allow_redirects=False, ssl=tls, timeout=_TIMEOUT
        )

    def _realm(self, text: str) -> URL:
        try:
            realm = URL(text).with_fragment(None)
            sensible = realm.scheme in ("http", "https") and realm.host and realm.port and realm.user is None
        except ValueError:
            sensible = False
        if not sensible:
            raise FailedPrecondition(f"registry {self._host}: asks for a token without saying where to get one")
        registry = self._host.url
        safe = registry.scheme == "http" and (is_loopback(realm.host or "") or not is_loopback(registry.host or ""))
        if realm.scheme == "http" and not safe:
            raise FailedPrecondition(f"registry {self._host}: its token service {realm.host} has no TLS")
        return realm

    def _token_of(self, body: bytes) -> tuple[str, float]:
        try:
            document: Any = json.loads(body)
            token = document.get("token") or document.get("access_token")
            seconds = lifetime(document.get("expires_in"))
        except (ValueError, AttributeError, RecursionError, OverflowError):
            token, seconds = None, 0.0
        if not isinstance(token, str) or not token or not (token.isascii() and token.isprintable()):
            raise FailedPrecondition(f"registry {self._host}: its token service gave no token")
        return token, seconds


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    while len(body) <= _MAX_TOKEN_BYTES and (data := await response.content.read(65536)):
        body += data
    return bytes(body)


def login(host: object) -> str:
    """What to do about a registry that doesn't know one."""
    return f"is the name spelt right? a private image needs --user, or credentials for {host} in ~/.docker/config.json"


def _parameters(text: str) -> dict[str, str]:
    """The parameters of a challenge (RFC 9110, 11.2)."""
    return {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or word for name, quoted, word in _PARAMETER.findall(text)}


def _merged(scopes: Scopes, asked: str) -> list[str]:
    """The scopes that are needed, and those that the registry asks for beside them."""
    found: dict[str, list[str]] = {}
    for scope in [*scopes, *asked.split()[:16]]:
        resource, _, actions = scope.rpartition(":")
        known = found.setdefault(resource, [])
        known += [action for action in actions.split(",") if action not in known]
    return [f"{resource}:{','.join(actions)}" if resource else ",".join(actions) for resource, actions in found.items()]
