"""Debian's ctr runs images through the gateway, each container on a snapshot of its own, as against containerd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.ctr import Side, ours_of, running_theirs, same
from tests.support import images
from tests.support.archives import layout, tar
from tests.support.gateway_tasks import GatewayNode, gateway_node

IMAGE = "127.0.0.1:5000/box:latest"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with an environment, a working directory, a user, a stop signal and labels."""
    image = images.busybox_image(
        ["/bin/sh", "-c", "echo $GREETING from $(pwd) as $(id -u):$(id -g)"],
        Env=["PATH=/bin", "GREETING=hello"], WorkingDir="/tmp", User="12:34", StopSignal="SIGQUIT",
        Labels={"made": "by hand"},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("archive") / "box.tar"
    path.write_bytes(tar(layout({IMAGE: image})))
    return path


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("n"), "content", "snapshot") as made:
        yield made


@pytest.fixture(scope="module")
def ours(node: GatewayNode, archive: Path) -> Side:
    side = ours_of(node)
    side.ok("images", "import", str(archive))
    return side


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Side]:
    with running_theirs(tmp_path_factory) as side:
        side.ok("images", "import", str(archive))
        yield side


RUNS = [
    ("run", "--rm", IMAGE, "box"),
    ("run", "--rm", IMAGE, "box", "/bin/sh", "-c", "touch /written; ls /; exit 4"),
    ("run", "--rm", IMAGE, "box", "ls", "/"),
    ("run", "--rm", "--env", "GREETING=bye", "--cwd", "/", IMAGE, "box"),
    ("run", "--rm", "--read-only", IMAGE, "box", "touch", "/tmp/x"),
    ("run", "--rm", IMAGE, "box", "nothing404"),
    ("run", "--rm", "nothing:latest", "box"),
    ("run", "--rm", "--snapshotter", "native", IMAGE, "box"),
    ("run", "--rm", "--snapshotter", "nothing", IMAGE, "box"),
    ("run", "--rm", "--uidmap", "0:100000:99", "--gidmap", "0:100000:99", IMAGE, "box", "cat", "/proc/self/uid_map"),
    ("containers", "ls"),
    ("snapshots", "ls"),
    ("leases", "ls", "-q"),
]  # fmt: skip


@pytest.mark.parametrize("command", RUNS, ids=[" ".join(one[2:])[:60] for one in RUNS])
def test_ctr_run_of_an_image_goes_as_against_containerd(ours: Side, theirs: Side, command: tuple[str, ...]) -> None:
    try:
        same(ours, theirs, *command)
    finally:
        for side in (ours, theirs):
            side.ctr("containers", "rm", "box")


def test_a_container_is_there_with_its_image_and_its_snapshot_until_it_is_removed(ours: Side, theirs: Side) -> None:
    shown = []
    for side in (ours, theirs):
        side.ok("run", "--detach", "--null-io", IMAGE, "held", "sleep", "600")
        listed = side.ok("containers", "ls").split()
        assert side.ctr("snapshots", "info", "held").returncode == 0
        side.end("held")
        shown.append(listed)
        assert side.ctr("snapshots", "info", "held").returncode != 0
    assert shown[0] == shown[1]
    assert IMAGE in shown[0]


def test_a_stopped_containers_task_is_started_anew_on_its_snapshot(ours: Side, theirs: Side) -> None:
    for side in (ours, theirs):
        side.ok("run", IMAGE, "again", "sh", "-c", "echo x >>/tmp/times; wc -l </tmp/times")
        side.ctr("tasks", "rm", "again")
        assert side.ok("tasks", "start", "again").strip() == "2"
        side.ctr("tasks", "rm", "again")
        side.ok("containers", "rm", "again")
