"""The OCI distribution specification v1.1, over HTTPS; plain HTTP for loopback, or where it was asked for.

A registry may be several hosts (`hosts`): mirrors, and the registry itself, asked in their order. Another one is asked
where one has nothing, refuses, or isn't there; bytes of a wrong digest are an error whoever served them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import structlog
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound, ShoalError
from shoal_bus.image_reference import Reference
from shoal_bus.types import Descriptor
from yarl import URL

from shoal_content import media
from shoal_content.blobs.layout import digest_of
from shoal_content.registry import credentials, referrers
from shoal_content.registry import headers as said
from shoal_content.registry.auth import Authorizer
from shoal_content.registry.credentials import Credential
from shoal_content.registry.hosts import DEFAULT_DIRECTORY, PULL, PUSH, RESOLVE, Host, hosts_of, with_headers
from shoal_content.registry.resolver import Body, Interrupted, Referrer, Resolver, Source
from shoal_content.registry.tokens import Scopes, Tokens
from shoal_content.registry.tracing import RequestLog
from shoal_content.registry.transport import (
    CHUNK,
    Patience,
    Payload,
    Refused,
    Transport,
    Waiting,
    pause,
)
from shoal_content.registry.upload import Upload, abandon

log = structlog.get_logger(__name__)

T = TypeVar("T")

_ACCEPT = ", ".join([*sorted(media.INDEXES), *sorted(media.MANIFESTS), "*/*;q=0.1"])
_TRIES_OF_A_MIRROR = 2
_MOST_PAGES = 64
_FOUND = frozenset({200})


class HttpResolver(Resolver):
    """One repository of one registry, for one pull; with `push`, for one push.

    `directory` holds the `hosts.toml` files. `credential` is the caller's own: without it, the node's are used, which
    go nowhere in the clear because a caller wants it so. `headers` are the caller's, too; with `tls`, that is spoken on
    loopback as well. `tokens` are kept between resolvers. `piece` is how many bytes of a blob are sent at once; 0 for
    all of them. `waiting` is told what a registry has us wait for, and the FIFO `log` what it is asked and answers.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool = False,
        tls: bool = False,
        headers: Mapping[str, str] | None = None,
        push: bool = False,
        directory: Path = DEFAULT_DIRECTORY,
        credential: Credential | None = None,
        tokens: Tokens | None = None,
        patience: Patience | None = None,
        piece: int = 0,
        waiting: Waiting = lambda told: None,
        log: Path | None = None,
    ) -> None:
        self._log = log
        self._reference, self._plain_http, self._tls, self._push = reference, plain_http, tls, push
        self._headers = headers or {}
        self._directory, self._credential = directory, credential
        self._tokens = tokens if tokens is not None else Tokens()
        self._patience, self._piece, self._waiting = patience or Patience(), piece, waiting
        self._stack = AsyncExitStack()
        self._transports: list[Transport] = []
        self._begun: dict[str, URL] = {}
        """Uploads that a registry has begun where it wouldn't mount, by digest."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            found = await asyncio.to_thread(
                hosts_of, self._reference, self._directory, plain_http=self._plain_http, tls=self._tls
            )
            hosts = [with_headers(host, self._headers) for host in found]
            traces = []
            if self._log is not None:
                requests = RequestLog(self._log)
                stack.callback(requests.close)
                traces = [requests.config]
            # Compressed layers stay as they are; the environment's netrc isn't for us.
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    auto_decompress=False,
                    trust_env=False,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    headers={"User-Agent": "shoal", "Accept-Encoding": "identity"},
                    read_bufsize=CHUNK,
                    trace_configs=traces,
                )
            )
            for host in hosts:
                authorizer = Authorizer(session, host, await self._credential_for(host), self._tokens)
                self._transports.append(
                    Transport(session, host, self._reference.path, authorizer, self._patience, self._waiting)
                )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for place in self._begun.values():
                await abandon(self._pusher, self._scopes(self._pusher), place)
        finally:
            await self._stack.aclose()

    # ----------------------------------------------------------------------------------------------------------- read

    async def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """What a reference names right now."""
        capability = PULL if reference.digest else RESOLVE
        transport, data, media_type = await self._first(
            capability, lambda one: self._manifest(one, reference.selector, str(reference))
        )
        digest = digest_of(data, reference.digest.partition(":")[0] or "sha256")
        if reference.digest and digest != reference.digest:
            raise DataLoss(f"{reference}: registry {transport.host} served other bytes, whose digest is {digest}")
        return Descriptor(media_type=media.kind_of(data, media_type), digest=digest, size=len(data)), data

    async def manifest(self, reference: Reference, descriptor: Descriptor) -> bytes:
        """A manifest by digest."""
        transport, data, _ = await self._first(PULL, lambda one: self._manifest(one, descriptor.digest, str(reference)))
        digest = digest_of(data, descriptor.digest.partition(":")[0])
        if digest != descriptor.digest or len(data) != descriptor.size:
            raise DataLoss(
                f"{reference}: registry {transport.host} served {len(data)} bytes of digest {digest} for manifest"
                f" {descriptor.digest} of {descriptor.size} bytes"
            )
        return data

    @asynccontextmanager
    async def blob(self, reference: Reference, descriptor: Descriptor, offset: int = 0) -> AsyncIterator[Body]:
        """A blob from `offset` on, or from its beginning where the registry knows no ranges."""
        what = f"{reference}: blob {descriptor.digest}"
        transport, begins, response = await self._first(
            PULL, lambda one: self._open(one, descriptor.digest, offset, what)
        )
        try:
            yield Body(begins, transport.read(response))
        finally:
            response.close()

    async def referrers(self, reference: Reference, digest: str, artifact_type: str = "") -> list[Referrer]:
        """What refers to a manifest: by the registry's own API, or by the tag schema where it has none."""

        async def ask(transport: Transport) -> list[Referrer]:
            try:
                return await self._referrers(transport, str(reference), digest, artifact_type)
            except (NotFound, Refused):
                found = await self._tagged_referrers(transport, str(reference), digest)
                return referrers.read(found, artifact_type) if found is not None else []

        return await self._first(PULL, ask)

    # ---------------------------------------------------------------------------------------------------------- write

    async def exists(self, reference: Reference, descriptor: Descriptor, *, manifest: bool = False) -> bool:
        """Asked for by HEAD."""
        transport = self._pusher
        url = transport.url("manifests" if manifest else "blobs", descriptor.digest)
        headers = {"Accept": f"{descriptor.media_type}, {_ACCEPT}"} if manifest else {}
        try:
            await self._done(transport, "HEAD", url, f"{reference}: {descriptor.digest}", _FOUND, headers)
        except NotFound:
            return False
        return True

    async def mount(self, reference: Reference, descriptor: Descriptor, repository: str) -> bool:
        """A registry that doesn't mount has begun an upload instead: the one that follows goes on with it."""
        transport = self._pusher
        source = transport.host.repository(repository)
        query = {"mount": descriptor.digest, "from": source}
        url = transport.url("blobs", "uploads", "", **query)
        what = f"{reference}: blob {descriptor.digest}"
        scopes = (*self._scopes(transport), f"repository:{source}:pull")
        try:
            response = await self._done(
                transport, "POST", url, what, frozenset({201, 202}), {}, Payload.of(b""), scopes=scopes
            )
        except ShoalError as error:
            log.debug("registry.not_mounted", digest=descriptor.digest, source=source, error=error.message)
            return False
        if response.status == 202:
            self._begun[descriptor.digest] = transport.leads_to(url, response)
        return response.status == 201

    async def upload(
        self,
        reference: Reference,
        descriptor: Descriptor,
        source: Source,
        report: Callable[[int], None] = lambda sent: None,
    ) -> None:
        """Sends a blob."""
        transport = self._pusher
        what = f"{reference}: blob {descriptor.digest}"
        upload = Upload(transport, self._scopes(transport), what, descriptor, source, self._piece, report)
        await upload.run(self._begun.pop(descriptor.digest, None))

    async def put_manifest(self, reference: Reference, descriptor: Descriptor, data: bytes, tag: str = "") -> None:
        """Stores a manifest; where the registry has no referrers API, its subject's tag names it then."""
        transport = self._pusher
        response = await self._put(transport, str(reference), tag or descriptor.digest, descriptor, data)
        told = response.headers.get("Docker-Content-Digest", descriptor.digest)
        if told != descriptor.digest and told.partition(":")[0] == descriptor.digest.partition(":")[0]:
            raise DataLoss(f"{reference}: registry {transport.host} has kept other bytes than it was sent")
        subject = referrers.subject_of(data)
        if subject and "OCI-Subject" not in response.headers:
            found = await self._tagged_referrers(transport, str(reference), subject)
            index = referrers.with_referrer(found, descriptor, data)
            if index is not None:
                target = Descriptor(media_type=media.OCI_INDEX, digest=digest_of(index), size=len(index))
                await self._put(transport, str(reference), referrers.tag_of(subject), target, index)

    # --------------------------------------------------------------------------------------------------------- within

    async def _credential_for(self, host: Host) -> Credential | None:
        if self._credential is not None and (host.server or not host.mirrors):
            return self._credential
        if not host.trusted:
            return None
        return await credentials.find(self._reference.domain if not host.mirrors else host.domain)

    def _scopes(self, transport: Transport) -> Scopes:
        return (f"repository:{transport.repository}:{'pull,push' if self._push else 'pull'}",)

    def _able(self, capability: str) -> list[Transport]:
        able = [one for one in self._transports if capability in one.host.capabilities]
        if not able:
            raise FailedPrecondition(
                f"{self._reference}: no host of its registry may {capability}",
                hint="see the hosts.toml of the registry",
            )
        return [one for one in able if not one.failed] or able

    @property
    def _pusher(self) -> Transport:
        """Whom images are pushed to: the first that may."""
        return self._able(PUSH)[0]

    async def _first(self, capability: str, ask: Callable[[Transport], Awaitable[T]]) -> T:
        """The answer of the first host that has one; else what the last one said, which is the registry itself."""
        able = self._able(capability)
        for transport in able[:-1]:
            try:
                return await ask(transport)
            except DataLoss:
                raise
            except ShoalError as error:
                transport.failed = transport.failed or not isinstance(error, NotFound | Interrupted)
                log.info("registry.asking_another", registry=str(transport.host), error=error.message)
        return await ask(able[-1])

    async def _request(
        self,
        transport: Transport,
        method: str,
        url: URL,
        what: str,
        wanted: frozenset[int],
        headers: dict[str, str],
        payload: Payload | None = None,
        *,
        scopes: Scopes = (),
    ) -> aiohttp.ClientResponse:
        tries = 0 if self._push or transport.host.server else _TRIES_OF_A_MIRROR
        return await transport.request(
            method, url, what, scopes=scopes or self._scopes(transport), wanted=wanted, headers=headers,
            payload=payload, tries=tries,
        )  # fmt: skip

    async def _done(self, *asked: Any, **options: Any) -> aiohttp.ClientResponse:
        """`_request` for an answer whose headers are all that matters."""
        response = await self._request(*asked, **options)
        response.release()
        return response

    async def _open(
        self, transport: Transport, digest: str, offset: int, what: str
    ) -> tuple[Transport, int, aiohttp.ClientResponse]:
        headers = {"Accept": "application/octet-stream, */*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        url = transport.url("blobs", digest)
        response = await self._request(transport, "GET", url, what, frozenset({200, 206, 416}), headers)
        if response.status == 416:
            response.close()
            raise Interrupted(f"registry {transport.host} has no more than {offset} bytes")
        begins = 0 if response.status == 200 else said.first_byte(response.headers.get("Content-Range", ""))
        if begins is None or begins > offset:
            response.close()
            raise Interrupted(f"registry {transport.host} sent another range than it was asked for")
        return transport, begins, response

    async def _manifest(self, transport: Transport, selector: str, what: str) -> tuple[Transport, bytes, str]:
        url = transport.url("manifests", selector)
        data, response = await self._document(transport, url, what, {"Accept": _ACCEPT})
        return transport, data, response.headers.get("Content-Type", "")

    async def _document(
        self, transport: Transport, url: URL, what: str, headers: dict[str, str]
    ) -> tuple[bytes, aiohttp.ClientResponse]:
        """A small body, whole."""
        attempt = 0
        while True:
            response = await self._request(transport, "GET", url, what, _FOUND, headers)
            try:
                data = bytearray()
                async for chunk in transport.read(response):
                    data += chunk
                    if len(data) > media.MAX_MANIFEST_BYTES:
                        raise FailedPrecondition(f"{what}: its manifest has more than {media.MAX_MANIFEST_BYTES} bytes")
                return bytes(data), response
            except Interrupted:
                attempt += 1
                if attempt == self._patience.tries:
                    raise
            finally:
                response.close()
            await pause(attempt)

    async def _put(
        self, transport: Transport, what: str, selector: str, descriptor: Descriptor, data: bytes
    ) -> aiohttp.ClientResponse:
        url = transport.url("manifests", selector)
        headers = {"Content-Type": descriptor.media_type}
        return await self._done(
            transport, "PUT", url, f"{what}: manifest {descriptor.digest}", frozenset({200, 201, 202, 204}), headers,
            Payload.of(data),
        )  # fmt: skip

    async def _referrers(self, transport: Transport, what: str, digest: str, artifact_type: str) -> list[Referrer]:
        url = transport.url("referrers", digest, **({"artifactType": artifact_type} if artifact_type else {}))
        found: list[Referrer] = []
        seen: set[str] = set()
        while str(url) not in seen and len(seen) < _MOST_PAGES:
            seen.add(str(url))
            data, response = await self._document(transport, url, what, {"Accept": media.OCI_INDEX})
            found += referrers.read(data, artifact_type)
            if len(found) > referrers.MOST:
                raise FailedPrecondition(f"{what}: more than {referrers.MOST} manifests refer to it")
            following = said.next_page(response.headers.get("Link", ""))
            if not following:
                break
            try:
                url = said.target(url, following)
            except ValueError as error:
                raise FailedPrecondition(f"registry {transport.host}: its Link can't be followed: {error}") from None
            if url.origin() != transport.host.url.origin():
                raise FailedPrecondition(f"registry {transport.host}: its Link leads to another registry")
        return found

    async def _tagged_referrers(self, transport: Transport, what: str, digest: str) -> bytes | None:
        """The index under a subject's referrers tag, if there is one (distribution-spec, "Referrers Tag Schema")."""
        url = transport.url("manifests", referrers.tag_of(digest))
        try:
            data, _ = await self._document(transport, url, what, {"Accept": media.OCI_INDEX})
        except NotFound:
            return None
        return data
