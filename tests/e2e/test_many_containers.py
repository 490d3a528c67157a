"""Five hundred containers at once on one node: started, listed, counted and removed, and nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api
from shoal_bus.client import Client
from shoal_bus.node import load

from tests.e2e.shoal import Shoal
from tests.support.leaks import Leaks

COUNT = 500
OPEN_FILES = 256
"""The soft limit the node is started with: less than its containers need."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoal]:
    directory = tmp_path_factory.mktemp("node")
    leaks = Leaks(str(directory))
    with Shoal(directory) as shoal:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
        try:
            shoal.up()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield shoal
    leaks.check()


def run_all(node: Shoal, image: str, ids: list[str]) -> list[api.Task]:
    """Runs a container for each id, all asked for at once."""

    async def run() -> list[api.Task]:
        found = load(node.state)
        async with Client.open(found.address, node=found.name) as client:
            requests = [api.RunTask(id=id, image=image, args=["sleep", "600"]) for id in ids]
            runs = [client.operate(api.TASK_RUN, request, timeout=300) for request in requests]
            return await asyncio.gather(*runs)

    return asyncio.run(run())


def list_all(node: Shoal) -> list[api.Task]:
    async def collect() -> list[api.Task]:
        found = load(node.state)
        async with Client.open(found.address, node=found.name) as client:
            return await client.collect(api.TASK_LIST, api.ListTasks())

    return asyncio.run(collect())


def held(node: Shoal) -> dict[str, int]:
    """Open files of each service, and what they and their containers have on disk, in files."""
    found = {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in node.pids.items()}
    for place in ("root/snapshot", "state/runtime"):
        found[place] = sum(len(names) + len(files) for _, names, files in os.walk(node.directory / place))
    return found


@pytest.mark.timeout(400)
def test_five_hundred_at_once(node: Shoal, image: str) -> None:
    warm = [f"warm-{number}" for number in range(2)]
    run_all(node, image, warm)
    node.json("stats", "--no-stream", "--interval", "0.1")
    node.ok("rm", "--force", *warm)
    before = held(node)
    ids = [f"many-{number:03}" for number in range(COUNT)]
    tasks = run_all(node, image, ids)
    assert {task.status for task in tasks} == {"running"}
    assert len({task.pid for task in tasks}) == COUNT
    assert [(task.container_id, task.pid) for task in list_all(node)] == [(t.container_id, t.pid) for t in tasks]
    assert sorted((one["id"], one["task"]["status"]) for one in node.json("ps")) == [(id, "running") for id in ids]
    figures = node.json("stats", "--no-stream", "--interval", "0.1")
    assert sorted(one["container_id"] for one in figures) == ids
    assert {one["pids"]["current"] for one in figures} == {1}
    removed = node.run("rm", "--force", *ids, timeout=300)
    assert (removed.returncode, removed.stdout.split()) == (0, ids), removed.stderr
    assert node.json("ps", "--all") == []
    assert list_all(node) == []
    deadline = time.monotonic() + 20
    while grown := {name: count for name, count in held(node).items() if count > before[name]}:
        assert time.monotonic() < deadline, f"{grown} instead of {before}"
        time.sleep(0.1)
