"""Tokens: what is asked of a token service, how long its answer is kept, and what a bad one can do."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from shoal_bus.errors import FailedPrecondition, PermissionDenied, ShoalError, Unauthenticated, Unavailable
from shoal_bus.image_reference import Reference
from shoal_content.registry import auth
from shoal_content.registry.credentials import Credential
from shoal_content.registry.http import HttpResolver
from shoal_content.registry.tokens import Tokens

from tests.support import images
from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, file
from tests.support.registry import Registry, running
from tests.support.resolver_suite import DATA, descriptor_of, push, source_of

ME = Credential("me", "s3cret")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
def image(registry: Registry) -> Image:
    built = Image.build([Layer([file("data", b"d" * 1000)], "none")])
    images.push(built, registry.host, "team/app", "v1")
    return built


@dataclass
class Guard:
    """A token service, and a registry that lets in whoever has one of its tokens with the right scope."""

    proxy: Proxy
    asked: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Method, authorization (or refresh token), and scopes of each question."""
    valid: dict[str, list[str]] = field(default_factory=dict)
    expires_in: int = 300
    answer: Callable[[web.Request], web.StreamResponse] | None = None
    realm: str = ""
    refused: int = 0

    async def hook(self, request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            return await self._token(request)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        action = "pull" if request.method in ("GET", "HEAD") else "push"
        if any(s.startswith("repository:team/app:") and action in s.split(":")[2] for s in self.valid.get(given, [])):
            return None
        self.refused += 1
        realm = self.realm or f"http://{self.proxy.host}/token"
        challenge = f'Bearer realm="{realm}",service="registry",scope="repository:team/app:{action}"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    async def _token(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            form = await request.post()
            assert form["grant_type"] == "refresh_token"
            who, scopes = str(form["refresh_token"]), str(form["scope"]).split()
        else:
            who, scopes = request.headers.get("Authorization", ""), request.query.getall("scope")
        self.asked.append((request.method, who, scopes))
        if self.answer is not None:
            return self.answer(request)
        token = f"tok-{len(self.asked)}"
        self.valid[token] = scopes
        return web.json_response({"access_token": token, "expires_in": self.expires_in})


@pytest.fixture
async def guard(registry: Registry) -> AsyncIterator[Guard]:
    async with proxy(registry.host) as made:
        guard = Guard(made)
        made.hook = guard.hook
        yield guard


def reference(guard: Guard) -> Reference:
    return Reference(guard.proxy.host, "team/app", "v1")


def resolver(
    guard: Guard, tokens: Tokens | None = None, credential: Credential | None = ME, **options: bool
) -> HttpResolver:
    return HttpResolver(reference(guard), tokens=tokens, credential=credential, **options)


async def resolve(guard: Guard, tokens: Tokens | None = None, credential: Credential | None = ME) -> str:
    async with resolver(guard, tokens, credential) as opened:
        return (await opened.resolve(reference(guard)))[0].digest


async def test_token_is_kept_between_pulls_and_for_its_credential_alone(guard: Guard, image: Image) -> None:
    tokens = Tokens()
    for _ in range(3):
        assert await resolve(guard, tokens) == image.digest
    assert len(guard.asked) == guard.refused == 1
    await resolve(guard, tokens, Credential("other", "s3cret"))
    await resolve(guard, tokens, None)
    assert [who for _, who, _ in guard.asked] == [
        "Basic " + base64.b64encode(text).decode() if text else "" for text in (b"me:s3cret", b"other:s3cret", b"")
    ]


async def test_token_that_is_refused_early_is_asked_for_again(guard: Guard, image: Image) -> None:
    tokens = Tokens()
    await resolve(guard, tokens)
    guard.valid.clear()
    assert await resolve(guard, tokens) == image.digest
    assert len(guard.asked) == 2


async def test_expired_token_isnt_sent(guard: Guard, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens()
    await resolve(guard, tokens)
    import time

    later = time.monotonic() + 301
    monkeypatch.setattr("shoal_content.registry.tokens.time.monotonic", lambda: later)
    await resolve(guard, tokens)
    assert len(guard.asked) == guard.refused == 2


async def test_identity_token_is_posted_as_a_refresh_token(guard: Guard, image: Image) -> None:
    assert await resolve(guard, credential=Credential(identity_token="refresh-me")) == image.digest
    assert guard.asked == [("POST", "refresh-me", ["repository:team/app:pull"])]


async def test_registry_token_is_used_as_it_is(guard: Guard, image: Image) -> None:
    guard.valid["given"] = ["repository:team/app:pull"]
    assert await resolve(guard, credential=Credential(token="given")) == image.digest
    assert guard.asked == []


async def test_push_asks_once_for_all_it_needs(guard: Guard) -> None:
    made = Image.build([Layer([file("new", DATA)], "none")])
    async with resolver(guard, push=True) as opened:
        assert not await opened.exists(reference(guard), descriptor_of(DATA))
        await push(opened, reference(guard), made, "v2")
    assert [scopes for _, _, scopes in guard.asked] == [["repository:team/app:pull,push"]]
    assert guard.refused == 1


async def test_mount_asks_for_the_other_repository_too(guard: Guard, registry: Registry) -> None:
    blob = descriptor_of(DATA)
    base = Reference(registry.host, "team/base", "v1")
    async with HttpResolver(base, push=True) as opened:
        await opened.upload(base, blob, source_of(DATA))
    async with resolver(guard, push=True) as opened:
        assert await opened.mount(reference(guard), blob, "team/base")
    assert guard.asked[-1][2] == ["repository:team/app:pull,push", "repository:team/base:pull"]


async def test_many_requests_at_once_ask_for_one_token(guard: Guard, image: Image) -> None:
    async with resolver(guard) as opened:
        await asyncio.gather(*(opened.resolve(reference(guard)) for _ in range(8)))
    assert len(guard.asked) == 1


async def test_token_service_that_fails_once_is_asked_again(guard: Guard, image: Image) -> None:
    def answer(request: web.Request) -> web.StreamResponse:
        guard.answer = None
        return web.Response(status=503)

    guard.answer = answer
    assert await resolve(guard) == image.digest
    assert len(guard.asked) == 2


async def test_registry_that_never_lets_in_is_asked_a_few_times_only(guard: Guard, image: Image) -> None:
    guard.answer = lambda request: web.json_response({"token": f"useless-{len(guard.asked)}"})
    with pytest.raises(Unauthenticated, match=guard.proxy.host):
        await resolve(guard)
    assert guard.refused <= 3
    assert len(guard.asked) <= 2


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, b"", Unauthenticated), (400, b"", Unauthenticated), (403, b"", PermissionDenied), (500, b"", Unavailable),
        (302, b"", Unavailable), (200, b"", FailedPrecondition), (200, b"[]", FailedPrecondition),
        (200, b'{"token": 5}', FailedPrecondition), (200, b'{"token": "a\\r\\nEvil: 1"}', FailedPrecondition),
        (200, b'{"token": "\xc3\xa9"}', FailedPrecondition), (200, b"[" * 100_000, FailedPrecondition),
        (200, b'{"token": "' + b"x" * (2 << 20), FailedPrecondition),
    ],
)  # fmt: skip
async def test_bad_token_service_is_a_clear_error(
    guard: Guard, image: Image, status: int, body: bytes, error: type[ShoalError]
) -> None:
    guard.answer = lambda request: web.Response(status=status, body=body, headers={"Location": "http://127.0.0.1:1/"})
    with pytest.raises(error, match=guard.proxy.host) as raised:
        await resolve(guard)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("seconds", ["1e400", "-5", "null", '"soon"', "NaN", "[]", "9" * 400])
async def test_lifetime_that_makes_no_sense_is_no_failure(guard: Guard, image: Image, seconds: str) -> None:
    def answer(request: web.Request) -> web.StreamResponse:
        guard.valid["odd"] = request.query.getall("scope")
        return web.Response(body=f'{{"token": "odd", "expires_in": {seconds}}}'.encode())

    guard.answer = answer
    assert await resolve(guard) == image.digest


async def test_token_service_that_sends_without_an_end_is_given_up(
    guard: Guard, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aiohttp

    monkeypatch.setattr(auth, "_TIMEOUT", aiohttp.ClientTimeout(total=0.5))

    async def hook(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/token":
            return await guard.hook(request)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(100):
            await answer.write(b" ")
            await asyncio.sleep(0.1)
        return answer

    guard.proxy.hook = hook
    with pytest.raises(Unavailable, match="token service"):
        await resolve(guard)


@pytest.mark.parametrize(
    "realm",
    ["", "token", "ftp://127.0.0.1/", "http://[bad", "http://127.0.0.1:99999/", "http://token.invalid/",
     "http://user:pw@127.0.0.1/", "https:///"],
)  # fmt: skip
async def test_realm_that_is_no_place_for_a_credential_is_refused(guard: Guard, image: Image, realm: str) -> None:
    guard.realm = realm or "x"
    with pytest.raises(FailedPrecondition, match="token"):
        await resolve(guard)
    assert guard.asked == []


@pytest.mark.parametrize(
    "challenge",
    ["", "Bearer", "Basic", "Negotiate", "Bearer " + "a" * 7000, 'Bearer realm="' + "\\" * 7000, "Bearer ,,,="],
)
async def test_challenge_that_cant_be_met_is_no_loop(guard: Guard, image: Image, challenge: str) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        guard.refused += 1
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    guard.proxy.hook = hook
    with pytest.raises((Unauthenticated, FailedPrecondition)):
        await resolve(guard)
    assert guard.refused <= 3
