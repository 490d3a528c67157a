"""The OCI distribution specification v1.1 (pull), over HTTPS; plain HTTP for loopback, or where it was asked for.

Redirects are followed, and take no credential to another host. What may pass (no connection, 429, 5xx) is tried again
with growing pauses.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp
import structlog
from shoal_bus.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
)
from shoal_bus.types import Descriptor
from yarl import URL

from shoal_content import media
from shoal_content.layout import digest_of
from shoal_content.reference import DEFAULT_DOMAIN, Reference
from shoal_content.registry import credentials
from shoal_content.registry.auth import Authorizer, login
from shoal_content.registry.resolver import Body, Interrupted, Resolver

log = structlog.get_logger(__name__)

_DOCKER_HUB = "registry-1.docker.io"
_ACCEPT = ", ".join([*sorted(media.INDEXES), *sorted(media.MANIFESTS), "*/*;q=0.1"])
_ATTEMPTS = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_REDIRECTS = 10
_CHUNK = 1 << 20
_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=15, sock_connect=10, sock_read=30)
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


class HttpResolver(Resolver):
    """One registry, for one pull."""

    def __init__(self, reference: Reference, *, plain_http: bool = False) -> None:
        host = _DOCKER_HUB if reference.domain == DEFAULT_DOMAIN else reference.domain
        scheme = "http" if plain_http or _is_loopback(host) else "https"
        self._base = URL(f"{scheme}://{host}/v2/{reference.path}/", encoded=True)
        self._reference = reference
        self._session: aiohttp.ClientSession | None = None
        self._authorizer: Authorizer | None = None

    async def __aenter__(self) -> Self:
        credential = await asyncio.to_thread(credentials.find, self._reference.domain)
        # Compressed layers stay as they are; the environment's netrc isn't for us.
        self._session = aiohttp.ClientSession(
            timeout=_TIMEOUT,
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "shoal", "Accept-Encoding": "identity"},
            read_bufsize=_CHUNK,
        )
        self._authorizer = Authorizer(self._session, self._base, self._reference.path, credential)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    # ------------------------------------------------------------------------------------------------------- resolver

    async def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """What a reference names right now."""
        data, said = await self._manifest(reference.selector, str(reference))
        digest = digest_of(data, reference.digest.partition(":")[0] or "sha256")
        if reference.digest and digest != reference.digest:
            raise DataLoss(f"{reference}: registry {self._host} served other bytes, whose digest is {digest}")
        return Descriptor(media_type=media.kind_of(data, said), digest=digest, size=len(data)), data

    async def manifest(self, reference: Reference, descriptor: Descriptor) -> bytes:
        """A manifest by digest."""
        data, _ = await self._manifest(descriptor.digest, str(reference))
        digest = digest_of(data, descriptor.digest.partition(":")[0])
        if digest != descriptor.digest or len(data) != descriptor.size:
            raise DataLoss(
                f"{reference}: registry {self._host} served {len(data)} bytes of digest {digest} for manifest"
                f" {descriptor.digest} of {descriptor.size} bytes"
            )
        return data

    @asynccontextmanager
    async def blob(self, reference: Reference, descriptor: Descriptor, offset: int = 0) -> AsyncIterator[Body]:
        """A blob from `offset` on, or from its beginning where the registry knows no ranges."""
        headers = {"Accept": "application/octet-stream, */*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url = self._base / "blobs" / descriptor.digest
        response = await self._get(url, headers, f"{reference}: blob {descriptor.digest}", passable=frozenset({416}))
        try:
            if response.status == 416:
                raise Interrupted(f"registry {self._host} has no more than {offset} bytes")
            yield Body(_offset_of(response, offset), self._chunks(response))
        finally:
            response.close()

    # --------------------------------------------------------------------------------------------------------- within

    @property
    def _host(self) -> str:
        """The registry as messages name it, always with its port."""
        return f"{self._base.host}:{self._base.port}"

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            while data := await response.content.read(_CHUNK):
                yield data
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Interrupted(f"registry {self._host} broke off ({_reason(error)})") from None

    async def _manifest(self, selector: str, what: str) -> tuple[bytes, str]:
        url = self._base / "manifests" / selector
        attempt = 0
        while True:
            response = await self._get(url, {"Accept": _ACCEPT}, what)
            try:
                data = bytearray()
                async for chunk in self._chunks(response):
                    data += chunk
                    if len(data) > media.MAX_MANIFEST_BYTES:
                        raise FailedPrecondition(f"{what}: its manifest has more than {media.MAX_MANIFEST_BYTES} bytes")
                return bytes(data), response.headers.get("Content-Type", "")
            except Interrupted:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise
            finally:
                response.close()
            await _pause(attempt)

    async def _get(
        self, url: URL, headers: dict[str, str], what: str, *, passable: frozenset[int] = frozenset()
    ) -> aiohttp.ClientResponse:
        """A response with a body worth reading, whatever tries, tokens and redirects that takes."""
        assert self._authorizer is not None
        attempt = asked_again = 0
        while True:
            used, wait = self._authorizer.header, 0.0
            try:
                response = await self._follow(url, headers, used)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem: ShoalError = Unavailable(
                    f"{what}: registry {self._host} can't be reached ({_reason(error)})", hint=_hint(error)
                )
            else:
                if response.status in (200, 206) or response.status in passable:
                    return response
                wait = _retry_after(response)
                challenges = response.headers.getall("WWW-Authenticate", [])
                response.close()
                if response.status == 401 and asked_again < 2 and await self._authorizer.answer(challenges, used):
                    asked_again += 1
                    continue
                problem = self._problem(response.status, what)
                if response.status not in _PASSING:
                    raise problem
            attempt += 1
            if attempt == _ATTEMPTS:
                raise problem
            log.debug("registry.retrying", registry=self._host, attempt=attempt, error=problem.message)
            await _pause(attempt, wait)

    async def _follow(self, url: URL, headers: dict[str, str], authorization: str) -> aiohttp.ClientResponse:
        assert self._session is not None
        for _ in range(_REDIRECTS):
            mine = url.origin() == self._base.origin()
            sent = headers | ({"Authorization": authorization} if mine and authorization else {})
            response = await self._session.get(url, headers=sent, allow_redirects=False)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            location = response.headers.get("Location", "")
            response.close()
            # A signed URL must stay as it is, letter by letter.
            target = url.join(URL(location, encoded=True))
            if target.scheme not in ("http", "https") or (url.scheme == "https" and target.scheme == "http"):
                raise FailedPrecondition(f"registry {self._host}: redirects from {url.scheme} to {target.scheme}")
            url = target
        raise FailedPrecondition(f"registry {self._host}: redirects more than {_REDIRECTS} times")

    def _problem(self, status: int, what: str) -> ShoalError:
        match status:
            case 401:
                return Unauthenticated(f"{what}: registry {self._host} asks who you are", hint=login(self._host))
            case 403:
                return PermissionDenied(
                    f"{what}: registry {self._host} forbids it", hint="ask for the right to pull, or log in"
                )
            case 404:
                return NotFound(f"{what}: not found in registry {self._host}", hint="is its name spelt right?")
            case 429:
                return Unavailable(
                    f"{what}: registry {self._host} has had too many requests", hint="try again later, or log in"
                )
            case _:
                return Unavailable(f"{what}: registry {self._host} answered {status}", hint="try again later")


def _is_loopback(host: str) -> bool:
    name = URL(f"http://{host}").host or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _offset_of(response: aiohttp.ClientResponse, asked: int) -> int:
    """Where a body begins: 206 says so in its Content-Range (RFC 9110, 14.4), 200 is the whole."""
    if response.status != 206:
        return 0
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    first = rest.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) > asked:
        raise Interrupted(f"registry {response.url.host} sent another range than it was asked for")
    return int(first)


def _reason(error: BaseException) -> str:
    """What the operating system or the library says, in a few words."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate isn't trusted"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS failed"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name isn't known"
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__


def _hint(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientSSLError):
        return "if it has no TLS, ask for --plain-http"
    return "is it up, and is its name spelt right?"


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_PAUSE) if value.isdigit() else 0.0


async def _pause(attempt: int, at_least: float = 0.0) -> None:
    pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
    await asyncio.sleep(max(at_least, pause * random.uniform(0.75, 1.25)))  # noqa: S311 (it only spreads retries)
