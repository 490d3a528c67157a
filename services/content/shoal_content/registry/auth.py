"""What a registry asks for with 401, answered: Basic (RFC 7617), and the distribution project's bearer tokens.

A credential goes to the registry itself, and to the token service that it names; to that one only over TLS, unless the
registry itself is spoken to without.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import aiohttp
from shoal_bus.errors import FailedPrecondition, PermissionDenied, Unauthenticated, Unavailable
from yarl import URL

from shoal_content.registry.credentials import Credential

_PARAMETER = re.compile(r'([A-Za-z][A-Za-z0-9_-]*)=(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_MAX_TOKEN_BYTES = 1 << 20
_CLIENT_ID = "shoal"


class Authorizer:
    """The `Authorization` header for one registry and one repository, gotten when it is first asked for."""

    def __init__(
        self, session: aiohttp.ClientSession, registry: URL, repository: str, credential: Credential | None
    ) -> None:
        self._session, self._registry, self._credential = session, registry, credential
        self._scope = f"repository:{repository}:pull"
        self._lock = asyncio.Lock()
        self.header = ""

    async def answer(self, challenges: Sequence[str], used: str) -> bool:
        """Answers a 401 to a request that carried `used`; says whether it is worth asking again."""
        async with self._lock:
            if self.header != used:
                return True  # somebody else has got a newer one meanwhile
            for challenge in challenges:
                scheme, _, rest = challenge.partition(" ")
                if scheme.lower() == "bearer":
                    header = f"Bearer {await self._token(_parameters(rest))}"
                elif scheme.lower() == "basic" and self._credential is not None and self._credential.user:
                    header = self._credential.basic
                else:
                    continue
                if header == used:
                    return False
                self.header = header
                return True
            return False

    async def _token(self, parameters: dict[str, str]) -> str:
        realm = self._realm(parameters.get("realm", ""))
        asked = {"scope": parameters.get("scope", self._scope)}
        if "service" in parameters:
            asked["service"] = parameters["service"]
        try:
            async with self._ask(realm, asked) as response:
                status, body = response.status, await _read(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
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

    def _ask(self, realm: URL, asked: dict[str, str]) -> aiohttp.client._RequestContextManager:
        credential = self._credential
        if credential is not None and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token, "client_id": _CLIENT_ID}
            return self._session.post(realm, data=asked | form, allow_redirects=False)
        headers = {"Authorization": credential.basic} if credential is not None else {}
        return self._session.get(realm.update_query(asked), headers=headers, allow_redirects=False)

    def _realm(self, text: str) -> URL:
        try:
            realm = URL(text)
        except ValueError:
            realm = URL()
        if realm.scheme not in ("http", "https") or not realm.host:
            raise FailedPrecondition(f"registry {self._host}: asks for a token without saying where to get one")
        if realm.scheme == "http" and self._registry.scheme == "https":
            raise FailedPrecondition(f"registry {self._host}: its token service {realm.host} has no TLS")
        return realm

    def _token_of(self, body: bytes) -> str:
        try:
            document: Any = json.loads(body)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token or not (token.isascii() and token.isprintable()):
            raise FailedPrecondition(f"registry {self._host}: its token service gave no token")
        return token

    @property
    def _host(self) -> str:
        return f"{self._registry.host}:{self._registry.port}"


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    while len(body) <= _MAX_TOKEN_BYTES and (data := await response.content.read(65536)):
        body += data
    return bytes(body)


def login(host: str) -> str:
    """What to do about a registry that doesn't know one."""
    return f"is the name spelt right? a private image needs credentials for {host} in ~/.docker/config.json"


def _parameters(text: str) -> dict[str, str]:
    """The parameters of a challenge (RFC 9110, 11.2)."""
    return {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or word for name, quoted, word in _PARAMETER.findall(text)}
