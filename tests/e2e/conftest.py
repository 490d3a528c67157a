"""A node, a registry and an image that the tests of a module share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from shoal_cli.commandserver.client import OFF

from tests.e2e.shoal import Shoal, unique
from tests.support import images
from tests.support.leaks import Leaks
from tests.support.registry import Registry, running


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C reaches what the tests start, also when they themselves run in a background that ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def busybox(registry: Registry) -> str:
    """The reference of an image of busybox in the registry."""
    image = images.busybox_image(cmd=["sh", "-c", "echo its own command"], Env=["PATH=/bin", "FROM_IMAGE=yes"])
    return images.push(image, registry.host, "busybox", "latest")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoal]:
    """A node that the module's tests share; whatever they leave on it is removed, and nothing of it stays."""
    directory = tmp_path_factory.mktemp("node")
    leaks = Leaks(str(directory))
    with Shoal(directory) as shoal:
        shoal.up()
        yield shoal
    leaks.check()


@pytest.fixture(params=["the node's", "its own"])
def in_either_process(node: Shoal, request: pytest.FixtureRequest) -> Iterator[None]:
    """Commands run in a fork of the node's process, as they do where there is a node, and then in their own."""
    if request.param == "its own":
        node.environment[OFF] = "1"
    yield
    node.environment.pop(OFF, None)


@pytest.fixture(scope="module")
def box(node: Shoal, image: str) -> str:
    """The id of a container that does nothing: something to exec into."""
    id = unique("box")
    node.ok("run", "-d", "--name", id, image, "sleep", "100000")
    return id


@pytest.fixture(scope="module")
def image(node: Shoal, busybox: str) -> str:
    """That image, pulled."""
    node.ok("pull", busybox)
    return busybox
