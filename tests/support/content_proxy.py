"""A loopback proxy in front of a real registry, in the test's loop: it looks on, slows down, cuts off and refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

Hook = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
_PIECE = 16 * 1024
_SENT = ("Accept", "Range", "Authorization", "Host", "Content-Type", "Content-Range")
_ANSWERED = (
    "Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest", "WWW-Authenticate", "Location", "Range",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    path: str
    range: str
    authorization: str
    method: str = "GET"
    query: str = ""


class Proxy:
    """What passes through is the real registry's, but for `hook` (which may answer itself), `pause` and `cut_after`."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.hook: Hook | None = None
        self.pause = 0.0
        """Seconds between two pieces of a blob."""
        self.cut_after: int | None = None
        """Bytes of a blob after which the connection is cut."""
        self.cuts_of_uploads: list[int] = []
        """Of each of the next uploads, the bytes after which the connection is cut."""
        self.keeps_what_came = False
        """What came of an upload that is cut is kept, and told who asks: the real registry doesn't, others do."""
        self.seen: list[Seen] = []
        self.host = ""
        self._kept: dict[str, dict[str, str]] = {}

    def blob_requests(self, digest: str) -> list[Seen]:
        return [one for one in self.seen if one.path.endswith(digest)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        self.seen.append(
            Seen(
                request.path, headers.get("Range", ""), headers.get("Authorization", ""), request.method,
                request.query_string,
            )
        )  # fmt: skip
        if self.hook is not None and (answer := await self.hook(request)) is not None:
            return answer
        return await self.forward(request)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        is_upload = request.method in ("PUT", "PATCH") and "/blobs/uploads/" in request.path
        if is_upload and self.cuts_of_uploads and (request.content_length or 0) > self.cuts_of_uploads[0]:
            return await self._cut(request, self.cuts_of_uploads.pop(0))
        if request.method == "GET" and request.path in self._kept:
            return web.Response(status=204, headers=self._kept.pop(request.path))
        body = await request.read() if request.method in ("PUT", "PATCH", "POST") else None
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method, f"http://{self.upstream}{request.rel_url}", headers=_passed(request, _SENT), data=body,
                allow_redirects=False,
            ) as response,
        ):  # fmt: skip
            answer = web.StreamResponse(status=response.status, headers=_passed(response, _ANSWERED))
            await answer.prepare(request)
            is_blob, sent_bytes = "/blobs/" in request.path, 0
            while piece := await response.content.read(_PIECE):
                try:
                    await answer.write(piece)
                except ConnectionError:  # whoever asked was killed
                    return answer
                sent_bytes += len(piece)
                if is_blob and self.cut_after is not None and sent_bytes >= self.cut_after:
                    assert request.transport is not None
                    request.transport.abort()
                    return answer
                if is_blob and self.pause:
                    await asyncio.sleep(self.pause)
            return answer

    async def forward_unanswered(self, request: web.Request) -> None:
        """Has the real registry do it; what it says is lost."""
        body = await request.read()
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, f"http://{self.upstream}{request.rel_url}", headers=_passed(request, _SENT), data=body
            ) as response,
        ):
            await response.read()

    async def _cut(self, request: web.Request, after: int) -> web.StreamResponse:
        body = bytearray()
        while len(body) < after and (piece := await request.content.read(min(_PIECE, after - len(body)))):
            body += piece
        if self.keeps_what_came:
            async with (
                aiohttp.ClientSession() as session,
                session.patch(
                    f"http://{self.upstream}{request.rel_url}", data=bytes(body), headers=_passed(request, ("Host",))
                ) as response,
            ):
                assert response.status == 202, await response.text()
                kept = {key: response.headers[key] for key in ("Location", "Range")}
                self._kept[request.path] = kept
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


def _passed(message: web.Request | aiohttp.ClientResponse, names: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, value in message.headers.items() if key in names}


@asynccontextmanager
async def proxy(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy for the length of a block."""
    made = Proxy(upstream)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        made.host = f"127.0.0.1:{runner.addresses[0][1]}"
        yield made
    finally:
        await runner.cleanup()
