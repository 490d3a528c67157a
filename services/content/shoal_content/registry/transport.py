"""HTTP with one host of a registry: credentials, redirects, tries and pauses.

Redirects are followed, and take neither a credential nor a header of the configuration's to another host. What may pass
(no connection, 429, 5xx) is tried again with growing pauses, or when the registry says so (`Retry-After`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import structlog
from multidict import CIMultiDict
from shoal_bus.errors import (
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
)
from yarl import URL

from shoal_content.registry import headers as said
from shoal_content.registry.auth import Authorizer, login
from shoal_content.registry.hosts import Host
from shoal_content.registry.resolver import Interrupted
from shoal_content.registry.tokens import Scopes

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_REDIRECTS = 10
_CHALLENGES = 2
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_MOST_ERROR_BYTES, _ERROR_SECONDS = 4096, 2.0
CHUNK = 1 << 20

Waiting = Callable[[str], None]
"""Told what a registry has us wait for, and the empty text when it is over."""


@dataclass(frozen=True)
class Patience:
    """How long a registry is borne with."""

    tries: int = 4
    read_seconds: float = 30.0
    """Without a byte."""
    commit_seconds: float = 300.0
    """For the answer to an upload: the registry may still have to put it somewhere."""
    slow_seconds: float = 60.0
    slow_bytes: int = 64 << 10
    """Fewer bytes than these in that time are as good as none."""
    longest_wait: float = 120.0
    """All that a request waits because the registry says so."""


@dataclass(frozen=True)
class Payload:
    """What a request sends: its bytes, as often as it takes."""

    size: int
    read: Callable[[], AsyncIterator[bytes]]

    @classmethod
    def of(cls, data: bytes) -> Payload:
        async def read() -> AsyncIterator[bytes]:
            for at in range(0, len(data), CHUNK):
                yield data[at : at + CHUNK]

        return cls(len(data), read)


class Transport:
    """The requests of one resolver to one host."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        host: Host,
        repository: str,
        authorizer: Authorizer,
        patience: Patience,
        waiting: Waiting,
    ) -> None:
        self.host, self.patience = host, patience
        self.repository = host.repository(repository)
        self.failed = False
        """It couldn't be reached, or was of no use: it isn't asked any more."""
        self._session, self._authorizer, self._waiting = session, authorizer, waiting
        self._quiet_until = 0.0

    def url(self, *path: str, **query: str) -> URL:
        """A place in the repository; a mirror is told whose it is."""
        text = "/".join([str(self.host.url), self.repository, *path])
        asked = dict(query) | ({"ns": self.host.mirrors} if self.host.mirrors else {})
        return URL(text, encoded=True).with_query(asked) if asked else URL(text, encoded=True)

    async def request(
        self,
        method: str,
        url: URL,
        what: str,
        *,
        scopes: Scopes,
        wanted: frozenset[int],
        headers: Mapping[str, str] | None = None,
        payload: Payload | None = None,
        tries: int = 0,
    ) -> aiohttp.ClientResponse:
        """A response of a status that is wanted, whatever tries, tokens and redirects that takes."""
        tries = tries or self.patience.tries
        attempt = answered = 0
        waited = 0.0
        while True:
            await self._while_quiet()
            used, wait = self._authorizer.header(scopes), 0.0
            try:
                response = await self._follow(method, url, headers or {}, used, payload)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = self._unreachable(what, error)
            except ValueError:  # the HTTP library's, of an answer that makes no sense
                raise FailedPrecondition(f"{what}: registry {self.host} speaks no HTTP that makes sense") from None
            else:
                if response.status in wanted:
                    return response
                wait = said.retry_after(response.headers.get("Retry-After", ""))
                challenges = response.headers.getall("WWW-Authenticate", [])
                detail = await _detail(response)
                response.release()
                problem = self._problem(response.status, what, detail, wait)
                passing = response.status in _PASSING
                if response.status == 401 and answered < _CHALLENGES:
                    try:
                        if await self._authorizer.answer(challenges, used, scopes):
                            answered += 1
                            continue
                    except Unavailable as error:  # its token service has its bad moments, too
                        problem, passing = error, True
                if not passing:
                    raise problem
            attempt += 1
            waited += wait
            # Who says when has more patience shown than who only fails.
            if attempt >= (tries * 4 if wait and tries > 1 else tries) or waited > self.patience.longest_wait:
                raise problem
            log.debug("registry.retrying", registry=str(self.host), attempt=attempt, wait=wait, error=problem.message)
            if wait:
                self._keep_quiet(wait)
            else:
                await pause(attempt)

    async def read(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """A body's bytes; Interrupted when it breaks off, UNAVAILABLE when it comes too slowly to be meant."""
        waited, come = 0.0, 0  # how long we waited for it: whoever takes it from us may take his time
        try:
            while True:
                asked = time.monotonic()
                data = await response.content.read(CHUNK)
                if not data:
                    return
                waited, come = waited + time.monotonic() - asked, come + len(data)
                if come >= self.patience.slow_bytes:
                    waited, come = 0.0, 0
                elif waited > self.patience.slow_seconds:
                    raise Unavailable(
                        f"registry {self.host} sends too slowly: {come} bytes in {waited:.0f} seconds",
                        hint="try again later",
                    )
                yield data
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Interrupted(f"registry {self.host} broke off ({reason(error)})") from None

    def leads_to(self, url: URL, response: aiohttp.ClientResponse) -> URL:
        """The `Location` of an answer from `url`."""
        try:
            return said.target(url, response.headers.get("Location", ""))
        except ValueError as error:
            raise FailedPrecondition(f"registry {self.host}: its Location can't be followed: {error}") from None

    # --------------------------------------------------------------------------------------------------------- within

    async def _follow(
        self, method: str, url: URL, headers: Mapping[str, str], authorization: str, payload: Payload | None
    ) -> aiohttp.ClientResponse:
        for _ in range(_REDIRECTS):
            response = await self._send(method, url, headers, authorization, payload)
            moved = response.status in (307, 308) or (response.status in (301, 302, 303) and method in ("GET", "HEAD"))
            if not moved:
                return response
            response.release()
            url = self.leads_to(url, response)
        raise FailedPrecondition(f"registry {self.host}: redirects more than {_REDIRECTS} times")

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], authorization: str, payload: Payload | None
    ) -> aiohttp.ClientResponse:
        sent = CIMultiDict(headers)
        if url.origin() == self.host.url.origin():
            if authorization:
                sent["Authorization"] = authorization
            # The configuration's word counts more than ours.
            for key in {key.lower() for key, _ in self.host.headers}:
                sent.popall(key, None)
            for key, value in self.host.headers:
                sent.add(key, value)
        patience = self.patience
        timeout = aiohttp.ClientTimeout(
            total=None, connect=self.host.connect_seconds, sock_connect=self.host.connect_seconds,
            sock_read=patience.read_seconds if payload is None else None,
        )  # fmt: skip
        options = {"allow_redirects": False, "ssl": self.host.tls_for(url), "timeout": timeout}
        if payload is None:
            return await self._session.request(method, url, headers=sent, **options)  # type: ignore[arg-type]
        sent["Content-Length"] = str(payload.size)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.host.connect_seconds + patience.read_seconds) as patient:

            def wait(seconds: float) -> None:
                with suppress(RuntimeError):  # the answer has come before all was sent, and nobody waits any more
                    patient.reschedule(loop.time() + seconds)

            async def data() -> AsyncIterator[bytes]:
                async for chunk in payload.read():
                    wait(patience.read_seconds)
                    yield chunk
                wait(patience.commit_seconds)

            return await self._session.request(method, url, headers=sent, data=data(), **options)  # type: ignore[arg-type]

    def _unreachable(self, what: str, error: BaseException) -> ShoalError:
        return Unavailable(f"{what}: registry {self.host} can't be reached ({reason(error)})", hint=_hint(error))

    def _problem(self, status: int, what: str, detail: str, wait: float) -> ShoalError:
        host = self.host
        why = f": {detail}" if detail else ""
        match status:
            case 401:
                return Unauthenticated(f"{what}: registry {host} asks who you are", hint=login(host.domain))
            case 403:
                return PermissionDenied(f"{what}: registry {host} forbids it{why}", hint="ask for the right, or log in")
            case 404:
                return NotFound(f"{what}: not found in registry {host}", hint="is its name spelt right?")
            case 429:
                when = f"in {wait:.0f} seconds" if wait else "later"
                return Unavailable(
                    f"{what}: registry {host} has had too many requests", hint=f"try again {when}, or log in"
                )
            case 405:
                return FailedPrecondition(f"{what}: registry {host} doesn't do that{why}", hint="is it read-only?")
            case 413:
                return TooLarge(f"{what}: too large for registry {host}{why}")
            case _ if 400 <= status < 500 and status != 408:
                return Refused(f"{what}: registry {host} answered {status}{why}")
            case _:
                return Unavailable(f"{what}: registry {host} answered {status}", hint="try again later")

    def _keep_quiet(self, seconds: float) -> None:
        """Nobody asks this host anything for a while: it said so."""
        until = time.monotonic() + min(seconds, self.patience.longest_wait)
        self._quiet_until = max(self._quiet_until, until)

    async def _while_quiet(self) -> None:
        told = False
        try:
            while (left := self._quiet_until - time.monotonic()) > 0:
                self._waiting(f"registry {self.host} has had too many requests: waiting {left:.0f} s")
                told = True
                await asyncio.sleep(left + random.uniform(0, min(0.25, left / 4)))  # noqa: S311 (it spreads retries)
        finally:
            if told:
                self._waiting("")


class Refused(FailedPrecondition):
    """The registry won't have what it was sent."""


class TooLarge(Refused):
    """It won't have that much at once."""


async def pause(attempt: int) -> None:
    """Waits before another try, longer each time."""
    seconds = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
    await asyncio.sleep(seconds * random.uniform(0.75, 1.25))  # noqa: S311 (it only spreads retries)


async def _detail(response: aiohttp.ClientResponse) -> str:
    """What a registry says of a refusal (distribution-spec, error codes), in a few words; nothing if it says none."""
    if response.status in (401, 404) or response.status >= 500 or response.status in (301, 302, 303, 307, 308):
        return ""
    body = b""
    with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
        async with asyncio.timeout(_ERROR_SECONDS):
            while len(body) < _MOST_ERROR_BYTES and (data := await response.content.read(_MOST_ERROR_BYTES)):
                body += data
    try:
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')} {first.get('message', '')}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


def reason(error: BaseException) -> str:
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
        return "if it has no TLS, ask for --plain-http; if its CA isn't the system's, name it in its hosts.toml"
    return "is it up, and is its name spelt right?"
