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


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    path: str
    range: str
    authorization: str


class Proxy:
    """What passes through is the real registry's, but for `hook` (which may answer itself), `pause` and `cut_after`."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.hook: Hook | None = None
        self.pause = 0.0
        """Seconds between two pieces of a blob."""
        self.cut_after: int | None = None
        """Bytes of a blob after which the connection is cut."""
        self.seen: list[Seen] = []
        self.host = ""

    def blob_requests(self, digest: str) -> list[Seen]:
        return [one for one in self.seen if one.path.endswith(digest)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        self.seen.append(Seen(request.path, headers.get("Range", ""), headers.get("Authorization", "")))
        if self.hook is not None and (answer := await self.hook(request)) is not None:
            return answer
        return await self.forward(request)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        sent = {k: v for k, v in request.headers.items() if k in ("Accept", "Range", "Authorization")}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.get(f"http://{self.upstream}{request.rel_url}", headers=sent, allow_redirects=False) as response,
        ):
            kept = ("Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest", "WWW-Authenticate")
            answer = web.StreamResponse(
                status=response.status, headers={k: v for k, v in response.headers.items() if k in kept}
            )
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


@asynccontextmanager
async def proxy(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy for the length of a block."""
    made = Proxy(upstream)
    app = web.Application()
    app.router.add_get("/{path:.*}", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        made.host = f"127.0.0.1:{runner.addresses[0][1]}"
        yield made
    finally:
        await runner.cleanup()
