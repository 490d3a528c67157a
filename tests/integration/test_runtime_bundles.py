"""Bundles as containerd's: who gets through to a rootfs, and what may be written to the shim's log."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shoal_bus.api import runtime as api

from tests.support import bundle as bundles
from tests.support.gateway import until
from tests.support.natsd import NatsServer
from tests.support.runtime import RuntimeNode, runtime_node

USER, GROUP = 10_000, 20_000
"""Who a container's root is here."""


@pytest.fixture
async def node(natsd: NatsServer) -> AsyncIterator[RuntimeNode]:
    """In a directory that everybody gets through, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="shoal") as name:
        Path(name).chmod(0o711)
        async with runtime_node(Path(name), natsd) as started:
            yield started


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_container_of_a_user_namespace_gets_through_to_its_rootfs(node: RuntimeNode) -> None:
    spec = node.spec(["sh", "-c", "exec 2>&1; id -u; cat /proc/self/uid_map; exit 3"])
    spec["linux"]["namespaces"].append({"type": "user"})
    for kind, first in (("uidMappings", USER), ("gidMappings", GROUP)):
        spec["linux"][kind] = [{"containerID": 0, "hostID": first, "size": 1000}]
    await node.client.call(api.CONTAINER_CREATE, api.CreateContainer(id="one", spec=spec))
    await node.client.call(api.TASK_CREATE, api.CreateTask(container_id="one", rootfs=bundles.bind(node.rootfs)))
    task = await node.start("one")
    assert task.pid
    assert (await node.wait("one")).exit_status == 3
    bundle = node.node.state / "runtime" / "bundles" / node.namespace / "one"
    # The rootfs may have setuid programs in it: nobody but that group gets there.
    assert (bundle.stat().st_uid, bundle.stat().st_gid, mode(bundle)) == (0, GROUP, 0o710)
    assert (mode(bundle.parent), mode(bundle / "config.json")) == (0o701, 0o600)
    await node.delete("one")
    await node.run("two", "true")
    other = bundle.with_name("two")
    assert (other.stat().st_gid, mode(other)) == (0, 0o700)


async def test_what_is_written_to_a_bundle_s_log_is_in_the_service_s(node: RuntimeNode) -> None:
    await node.create("one", "true")
    log = node.node.state / "runtime" / "bundles" / node.namespace / "one" / "log"
    fd = os.open(log, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(fd, b"one line\nand ")
        os.write(fd, b"another\n" + b"x" * 5000 + b"\n")
    finally:
        os.close(fd)
    await until(lambda: node.copy().log.read_text().count("shim.said") == 4)
    shown = node.copy().log.read_text()
    assert '"one line"' in shown
    assert '"and another"' in shown
    assert "x" * 4096 in shown
    assert "x" * 4097 not in shown
