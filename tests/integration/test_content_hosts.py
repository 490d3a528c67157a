"""hosts.toml against real registries: mirrors and their order, TLS with an own CA and client certificates, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from shoal_bus.api import content
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shoal_bus.image_reference import Reference
from shoal_content.registry.http import HttpResolver

from tests.support import images
from tests.support.certificates import Authority
from tests.support.content_proxy import Proxy, proxy
from tests.support.images import Image, Layer, file
from tests.support.natsd import NatsServer, free_port
from tests.support.node import TestNode
from tests.support.registry import Registry, running
from tests.support.resolver_suite import DATA, descriptor_of, push, read, source_of

NAME = "registry.invalid"
"""A registry that can't be reached but by what its hosts.toml says."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


@pytest.fixture
async def mirror(registry: Registry) -> AsyncIterator[Proxy]:
    async with proxy(registry.host) as made:
        yield made


@pytest.fixture
def image(registry: Registry) -> Image:
    built = Image.build([Layer([file("data", DATA)], "none")])
    images.push(built, registry.host, "team/app", "v1")
    return built


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    made = tmp_path / "certs.d"
    made.mkdir()
    return made


def configure(certs: Path, text: str, name: str = NAME) -> None:
    (certs / name).mkdir(exist_ok=True)
    (certs / name / "hosts.toml").write_text(text)


def resolver(certs: Path, name: str = NAME, **options: object) -> HttpResolver:
    return HttpResolver(Reference(name, "team/app", "v1"), directory=certs, **options)  # type: ignore[arg-type]


REFERENCE = Reference(NAME, "team/app", "v1")


# -------------------------------------------------------------------------------------------------------------- mirrors


async def test_mirror_is_asked_before_the_server_and_told_whose_image_it_is(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    configure(certs, f'server = "http://{registry.host}"\n[host."http://{mirror.host}"]')
    async with resolver(certs) as opened:
        target, _ = await opened.resolve(REFERENCE)
        assert target.digest == image.digest
        data = image.blobs[image.layers[0]][1]
        assert await read(opened, REFERENCE, descriptor_of(data)) == data
    assert len(mirror.seen) == 2
    assert {one.query for one in mirror.seen} == {f"ns={NAME}"}


async def test_server_is_asked_where_a_mirror_has_nothing_or_isnt_there(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    gone = free_port()
    mirrors = f'[host."http://127.0.0.1:{gone}"]\n[host."http://{mirror.host}"]'
    configure(certs, f'server = "http://{registry.host}"\n{mirrors}')
    for status in (404, 403, 500, 401):

        async def nothing(request: web.Request, status: int = status) -> web.StreamResponse | None:
            return web.Response(status=status)

        mirror.hook = nothing
        async with resolver(certs) as opened:
            assert (await opened.resolve(REFERENCE))[0].digest == image.digest
            data = image.blobs[image.layers[0]][1]
            assert await read(opened, REFERENCE, descriptor_of(data)) == data
    assert mirror.seen


async def test_what_the_server_says_counts_where_no_mirror_helps(certs: Path, registry: Registry, image: Image) -> None:
    configure(certs, f'server = "http://{registry.host}"\n[host."http://127.0.0.1:{free_port()}"]')
    async with resolver(certs) as opened:
        for _ in range(2):
            with pytest.raises(NotFound, match=registry.host):
                await opened.resolve(Reference(NAME, "team/app", "no-such-tag"))


async def test_wrong_bytes_of_a_mirror_are_an_error_and_nobody_else_is_asked(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    other = Image.build([Layer([file("other")])])

    async def lie(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=other.manifest, content_type=other.media_type)

    mirror.hook = lie
    async with proxy(registry.host) as server:
        configure(certs, f'server = "http://{server.host}"\n[host."http://{mirror.host}"]')
        async with resolver(certs) as opened:
            with pytest.raises(DataLoss, match=mirror.host):
                await opened.resolve(Reference(NAME, "team/app", digest=image.digest))
            with pytest.raises(DataLoss, match=mirror.host):
                await opened.manifest(REFERENCE, descriptor_of(image.manifest, image.media_type))
        assert server.seen == []


async def test_blob_that_a_mirror_breaks_off_goes_on_at_the_server(
    certs: Path, mirror: Proxy, registry: Registry, image: Image, node: TestNode, client: Client
) -> None:
    mirror.cut_after = 200_000
    cut = 0

    async def once(request: web.Request) -> web.StreamResponse | None:
        nonlocal cut
        if "/blobs/" not in request.path:
            return None
        cut += 1
        return web.Response(status=500) if cut > 2 else None

    mirror.hook = once
    async with proxy(registry.host) as server:
        configure(certs, f'server = "http://{server.host}"\n[host."http://{mirror.host}"]')
        pulled = await client.operate(
            content.IMAGE_PULL, content.PullImage(name=f"{NAME}/team/app:v1", snapshotter=""), timeout=60
        )
        assert pulled.target.digest == image.digest
        assert any(one.range.startswith("bytes=") for one in server.blob_requests(image.layers[0]))


async def test_capabilities_say_who_is_asked_for_what(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    async with proxy(registry.host) as server:
        configure(
            certs,
            f"""
            server = "http://{server.host}"
            capabilities = ["resolve"]
            [host."http://{mirror.host}"]
            capabilities = ["pull"]
            """,
        )
        async with resolver(certs, push=True) as opened:
            await opened.resolve(REFERENCE)
            assert (len(server.seen), len(mirror.seen)) == (1, 0)
            await opened.resolve(Reference(NAME, "team/app", digest=image.digest))
            assert (len(server.seen), len(mirror.seen)) == (1, 1)
            with pytest.raises(FailedPrecondition, match="push"):
                await opened.upload(REFERENCE, descriptor_of(DATA), source_of(DATA))


async def test_push_goes_to_the_first_host_that_may(certs: Path, mirror: Proxy, registry: Registry) -> None:
    configure(
        certs,
        f"""
        server = "http://127.0.0.1:{free_port()}"
        [host."http://127.0.0.1:{free_port()}"]
        capabilities = ["pull", "resolve"]
        [host."http://{mirror.host}"]
        capabilities = ["push"]
        """,
    )
    image = Image.build([Layer([file("pushed")])])
    async with resolver(certs, push=True) as opened:
        target = await push(opened, REFERENCE, image, "v2")
    async with HttpResolver(Reference(registry.host, "team/app", "v2")) as direct:
        assert (await direct.resolve(Reference(registry.host, "team/app", "v2")))[0].digest == target.digest


async def test_repository_is_rewritten_for_a_mirror(certs: Path, registry: Registry) -> None:
    image = Image.build([Layer([file("hub")])])
    images.push(image, registry.host, "hub/app", "v1")
    configure(
        certs,
        f"""
        [host."http://{registry.host}"]
        [host."http://{registry.host}".rewrite]
        "^team/(.*)" = "hub/$1"
        """,
    )
    async with resolver(certs) as opened:
        assert (await opened.resolve(REFERENCE))[0].digest == image.digest


async def test_headers_go_to_their_host_and_not_where_it_redirects(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    got: dict[str, list[str]] = {"mirror": [], "elsewhere": []}
    async with proxy(registry.host) as elsewhere:

        async def redirect(request: web.Request) -> web.StreamResponse | None:
            got["mirror"].append(",".join(request.headers.getall("X-Team", [])))
            return web.Response(status=307, headers={"Location": f"http://{elsewhere.host}{request.path}"})

        async def look(request: web.Request) -> web.StreamResponse | None:
            got["elsewhere"].append(request.headers.get("X-Team", ""))
            return None

        mirror.hook, elsewhere.hook = redirect, look
        configure(
            certs, f'[host."http://{mirror.host}"]\n[host."http://{mirror.host}".header]\nX-Team = ["blue", "green"]'
        )
        async with resolver(certs) as opened:
            await opened.resolve(REFERENCE)
    assert got == {"mirror": ["blue,green"], "elsewhere": [""]}


async def test_mirror_that_redirects_for_ever_is_left_for_the_server(
    certs: Path, mirror: Proxy, registry: Registry, image: Image
) -> None:
    async def loop(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": str(request.rel_url)})

    mirror.hook = loop
    configure(certs, f'server = "http://{registry.host}"\n[host."http://{mirror.host}"]')
    async with resolver(certs) as opened:
        assert (await opened.resolve(REFERENCE))[0].digest == image.digest
    assert len(mirror.seen) <= 10


# ------------------------------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def secured(tmp_path: Path, authority: Authority) -> Iterator[Registry]:
    """A registry that speaks TLS, to those alone who have a certificate of the CA's."""
    pair = authority.sign("server")
    with running(tmp_path / "tls", tls=(pair.certificate, pair.key), clients=authority.certificate) as started:
        yield started


async def reaches(certs: Path, registry: Registry, text: str) -> None:
    """Asks it for what isn't there: NOT_FOUND is an answer of its own."""
    configure(certs, f'server = "https://{registry.host}"\n{text}', registry.host)
    async with resolver(certs, registry.host) as opened:
        with pytest.raises(NotFound):
            await opened.resolve(Reference(registry.host, "team/app", "v1"))


async def test_own_ca_and_client_certificate_are_used(certs: Path, secured: Registry, authority: Authority) -> None:
    pair = authority.sign("client", usage="clientAuth")
    both = certs / "both.pem"
    both.write_text(pair.certificate.read_text() + pair.key.read_text())
    ca = f"ca = '{authority.certificate}'"
    await reaches(certs, secured, f"{ca}\nclient = [['{pair.certificate}', '{pair.key}']]")
    await reaches(certs, secured, f"{ca}\nclient = '{both}'")
    (certs / secured.host / "relative.pem").write_text(authority.certificate.read_text())
    await reaches(certs, secured, f"ca = ['relative.pem']\nclient = ['{both}']")
    image = Image.build([Layer([file("over TLS")])])
    there = Reference(secured.host, "team/app", "v1")
    async with resolver(certs, secured.host, push=True) as opened:
        await push(opened, there, image, "v1")
        assert (await opened.resolve(there))[0].digest == image.digest


async def test_without_ca_or_client_certificate_it_isnt_reached(
    certs: Path, secured: Registry, authority: Authority, tmp_path: Path
) -> None:
    client = authority.sign("client2", usage="clientAuth")
    stranger = Authority(tmp_path / "stranger", "stranger")
    pair = f"client = [['{client.certificate}', '{client.key}']]"
    for text, why in (
        (pair, "certificate isn't trusted"),
        (f"ca = '{stranger.certificate}'\n{pair}", "certificate isn't trusted"),
        (f"ca = '{authority.certificate}'", ""),
    ):
        with pytest.raises(Unavailable, match=f"{secured.host}.*{why}"):
            await reaches(certs, secured, text)


async def answers(certs: Path, registry: Registry) -> None:
    async with resolver(certs, registry.host) as opened:
        with pytest.raises(NotFound):
            await opened.resolve(Reference(registry.host, "team/app", "v1"))


@pytest.mark.parametrize("name", ["127.0.0.1:{}", "127.0.0.1_{}_", "_default"])
@pytest.mark.parametrize("beside", ["no hosts.toml", "an empty one"])
async def test_a_directory_of_certificates_is_read_as_docker_reads_it(
    certs: Path, secured: Registry, authority: Authority, name: str, beside: str
) -> None:
    client = authority.sign("client", usage="clientAuth")
    place = certs / name.format(secured.port)
    place.mkdir()
    if beside == "an empty one":
        (place / "hosts.toml").touch()
    (place / "ca.crt").write_text(authority.certificate.read_text())
    (place / "unrelated.pem").write_text("neither")
    (place / "sub.crt").mkdir()
    with pytest.raises(Unavailable):
        await answers(certs, secured)  # it wants to know who asks
    (place / "mine.cert").write_text(client.certificate.read_text())
    (place / "mine.key").write_text(client.key.read_text())
    await answers(certs, secured)
    (place / "mine.key").unlink()
    (place / "mine.cert").write_text(client.certificate.read_text() + client.key.read_text())
    await answers(certs, secured)
    (place / "ca.crt").unlink()
    with pytest.raises(Unavailable, match="certificate isn't trusted"):
        await answers(certs, secured)


async def test_certificates_that_cannot_be_used_are_named(certs: Path, secured: Registry, authority: Authority) -> None:
    place = certs / secured.host
    place.mkdir()
    (place / "mine.cert").write_text(authority.sign("client", usage="clientAuth").certificate.read_text())
    with pytest.raises(FailedPrecondition, match=f"{place}: mine.cert: not a certificate in PEM form with its own key"):
        await answers(certs, secured)
    (place / "mine.cert").unlink()
    (place / "ca.crt").write_text("nothing")
    with pytest.raises(FailedPrecondition, match=f"{place}: ca.crt: no certificates in PEM form"):
        await answers(certs, secured)


async def test_the_first_directory_is_the_one(certs: Path, registry: Registry, image: Image) -> None:
    """As containerd has it: one for a registry keeps the defaults from it, also when it is empty."""
    configure(certs, f'server = "http://{registry.host}"', "_default")
    async with resolver(certs) as opened:
        assert (await opened.resolve(REFERENCE))[0].digest == image.digest
    (certs / NAME).mkdir()
    async with resolver(certs) as opened:
        with pytest.raises(Unavailable, match=NAME):
            await opened.resolve(REFERENCE)


async def test_skip_verify_reaches_what_isnt_trusted(certs: Path, tmp_path: Path, authority: Authority) -> None:
    pair = authority.sign("unverified")
    with running(tmp_path / "unverified", tls=(pair.certificate, pair.key)) as started:
        with pytest.raises(Unavailable, match="isn't trusted"):
            await reaches(certs, started, "skip_verify = false")
        await reaches(certs, started, "skip_verify = true")


async def test_redirect_out_of_tls_is_refused(certs: Path, tmp_path: Path, authority: Authority) -> None:
    import ssl

    pair = authority.sign("redirects")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)

    async def out(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})

    app = web.Application()
    app.router.add_get("/{path:.*}", out)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        host = f"127.0.0.1:{runner.addresses[0][1]}"
        configure(certs, f"server = \"https://{host}\"\nca = '{authority.certificate}'", host)
        async with resolver(certs, host) as opened:
            with pytest.raises(FailedPrecondition, match="from TLS to none"):
                await opened.resolve(Reference(host, "team/app", "v1"))
    finally:
        await runner.cleanup()


# -------------------------------------------------------------------------------------------------------------- service


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path, certs: Path) -> Iterator[TestNode]:
    with TestNode(tmp_path, natsd) as started:
        started.environment["DOCKER_CONFIG"] = str(tmp_path / "docker")
        yield started


@pytest.fixture
def client(node: TestNode, connection: Connection, certs: Path) -> Client:
    node.start("content", arguments=("--registry-config", str(certs)))
    return Client(connection, node.name)


async def test_service_reads_its_configuration_for_each_pull(
    client: Client, certs: Path, registry: Registry, image: Image
) -> None:
    request = content.PullImage(name=f"{NAME}/team/app:v1", snapshotter="")
    configure(certs, "nonsense")
    with pytest.raises(FailedPrecondition, match=r"hosts\.toml"):
        await client.operate(content.IMAGE_PULL, request)
    configure(certs, f'server = "http://{registry.host}"')
    assert (await client.operate(content.IMAGE_PULL, request)).target.digest == image.digest


async def test_another_directory_of_hosts_is_named_by_a_link_of_the_nodes_state_alone(
    natsd: NatsServer, connection: Connection, tmp_path: Path, certs: Path, registry: Registry, image: Image
) -> None:
    configure(certs, f'server = "http://{registry.host}"')
    with TestNode(tmp_path, natsd) as node:
        node.start("content")
        client = Client(connection, node.name)
        links = node.state / content.REGISTRIES
        links.mkdir(parents=True)
        (links / "directory").mkdir()
        (links / "mine").symlink_to(certs)
        request = content.PullImage(name=f"{NAME}/team/app:v1", snapshotter="")
        for name in ("none", "directory"):
            with pytest.raises(NotFound, match=f"registry hosts {name}"):
                await client.operate(content.IMAGE_PULL, request.model_copy(update={"hosts": name}))
        for path in ("../registries/mine", str(certs), ".."):
            with pytest.raises(InvalidArgument):
                await client.operate(content.IMAGE_PULL, request.model_copy(update={"hosts": path}))
        pulled = await client.operate(content.IMAGE_PULL, request.model_copy(update={"hosts": "mine"}), timeout=30)
        assert pulled.target.digest == image.digest
        referrers = content.ListReferrers(name=f"{NAME}/team/app:v1", hosts="mine")
        assert await client.collect(content.REFERRER_LIST, referrers) == []
        for name in ("none", "mine"):
            with pytest.raises(NotFound, match=f"request log {name}"):
                await client.operate(content.IMAGE_PULL, request.model_copy(update={"hosts": "mine", "log": name}))
        with pytest.raises(InvalidArgument, match="plain HTTP and TLS"):
            await client.operate(content.IMAGE_PULL, request.model_copy(update={"plain_http": True, "tls": True}))


async def test_nodes_credential_isnt_sent_in_the_clear_because_a_caller_wants_plain_http(
    client: Client, registry: Registry, image: Image, tmp_path: Path, certs: Path
) -> None:
    docker = tmp_path / "docker"
    docker.mkdir()
    async with proxy(registry.host) as server:
        # A name of this machine that isn't a loopback's: as good as any host elsewhere.
        name = f"0.0.0.0:{server.host.partition(':')[2]}"
        (docker / "config.json").write_text(json.dumps({"auths": {name: {"auth": "dXNlcjpzZWNyZXQ="}}}))

        async def guard(request: web.Request) -> web.StreamResponse | None:
            if not request.headers.get("Authorization", ""):
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            return None

        server.hook = guard
        request = content.PullImage(name=f"{name}/team/app:v1", snapshotter="", plain_http=True)
        with pytest.raises(Exception, match="asks who you are"):
            await client.operate(content.IMAGE_PULL, request)
        assert {one.authorization for one in server.seen} == {""}
        credential = content.RegistryCredential(registry=name, user="mine", password="own")
        own = request.model_copy(update={"credential": await content.seal_credential(client, credential)})
        await client.operate(content.IMAGE_PULL, own)
        configure(certs, f'server = "http://{name}"', name)  # the node's own word
        await client.with_namespace("other").operate(content.IMAGE_PULL, request)
    await asyncio.sleep(0)
