"""`shoal up`: its life, its death, and what survives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import shoal_cli

from tests.e2e.shoal import COMMAND, Shoal
from tests.support.leaks import Leaks
from tests.support.natsd import NatsServer

SERVICES = {"content", "snapshot", "runtime", "network", "gateway"}
HOSTED = {"commands"}
"""What answers in one of their processes."""


@pytest.fixture
def fresh(tmp_path: Path, leaks: Leaks) -> Iterator[Shoal]:
    """A node of the test's own, not started yet."""
    with Shoal(tmp_path) as shoal:
        yield shoal


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_of(directory: Path) -> list[str]:
    """Command lines that name a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(directory) in line:
                found.append(f"{entry.name} {line}")
    return found


def gone(directory: Path, seconds: float = 15) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_node_comes_up_with_all_services_and_goes_without_a_trace(fresh: Shoal) -> None:
    fresh.up()
    listed = fresh.json("nodes")
    assert {entry["service"] for entry in listed} == SERVICES | HOSTED
    assert {entry["node"] for entry in listed} == {"e2e"}
    assert all(entry["copies"] == 1 for entry in listed)
    assert (fresh.state / "node.json").stat().st_mode & 0o777 == 0o600
    assert fresh.stop(signal.SIGTERM) == 0
    assert not (fresh.state / "node.json").exists()
    assert gone(fresh.directory) == []


def test_a_second_node_on_the_same_state_is_refused_and_the_first_goes_on(fresh: Shoal) -> None:
    fresh.up()
    places = ["--root", str(fresh.root), "--state", str(fresh.state)]
    second = subprocess.run([*COMMAND, "up", *places], capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 7
    assert f"process {fresh.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert fresh.json("images") == []


def test_a_killed_service_is_started_again(fresh: Shoal) -> None:
    fresh.up()
    before = fresh.pids
    for service in SERVICES:
        os.kill(before[service], signal.SIGKILL)
    for service in SERVICES:
        fresh.wait_for("process.restarts", 20, process=service)
        fresh.wait_for("service.ready", 30, times=2, service=service)
    assert fresh.json("ps", "--all") == []
    assert fresh.json("images") == []
    assert fresh.json("network", "ls") == []


def test_after_an_upgrade_a_service_is_started_again_by_its_own_code(fresh: Shoal) -> None:
    fresh.up()
    file = Path(shoal_cli.__file__)
    before = file.stat()

    def snapshot() -> psutil.Process:
        [found] = [c for c in psutil.Process(fresh.pid).children() if "snapshot" in " ".join(c.cmdline())]
        return found

    def started_again(times: int) -> str:
        snapshot().kill()
        fresh.wait_for("service.ready", 30, times=times + 1, service="snapshot")
        return " ".join(snapshot().cmdline())

    assert started_again(1).startswith("shoal-snapshot --node")  # a fork of the node's process
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    try:
        assert "-m shoal_snapshot --node" in started_again(2)
        assert fresh.run("images").returncode == 0
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_killed_bus_is_started_again_and_everybody_finds_it(fresh: Shoal) -> None:
    fresh.up()
    (line,) = [line for line in processes_of(fresh.state) if "nats-server" in line]
    os.kill(int(line.split()[0]), signal.SIGKILL)
    fresh.wait_for("process.restarts", 20, process="bus")
    deadline = time.monotonic() + 30
    while fresh.run("ps").returncode != 0:
        assert time.monotonic() < deadline
    assert {entry["service"] for entry in fresh.json("nodes")} == SERVICES | HOSTED


def test_a_killed_node_leaves_no_process_and_the_next_one_starts(fresh: Shoal) -> None:
    fresh.up()
    pids = fresh.pids
    fresh.kill()
    assert gone(fresh.directory) == []
    assert not any(alive(pid) for pid in pids.values())
    stale = fresh.run("ps")
    assert stale.returncode == 3
    assert stale.stderr.count("\n") == 1
    fresh.up()
    assert fresh.json("ps") == []


def test_a_node_uses_a_bus_of_ones_own(fresh: Shoal, tmp_path: Path) -> None:
    with NatsServer(tmp_path / "bus") as bus:
        fresh.up("--nats-url", bus.url)
        assert not (fresh.state / "nats").exists()
        assert {entry["service"] for entry in fresh.json("nodes")} == SERVICES | HOSTED
        from_elsewhere = fresh.run(
            "images", "--json", "--nats-url", bus.url, "--node", "e2e", SHOAL_STATE="/nonexistent"
        )
        assert from_elsewhere.returncode == 0, from_elsewhere.stderr
        assert fresh.stop() == 0


def test_quiet_says_nothing_while_all_is_well(fresh: Shoal) -> None:
    with fresh.log.open("ab") as log:
        up = subprocess.Popen(
            [*COMMAND, "up", "--quiet", "--node", "e2e", "--root", str(fresh.root), "--state", str(fresh.state)],
            env=fresh.environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while fresh.run("ps").returncode != 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    assert fresh.log.read_text() == ""


def test_containerd_flags_put_the_gateway_on_its_socket(fresh: Shoal, tmp_path: Path) -> None:
    address = tmp_path / "a" / "containerd.sock"
    fresh.up("--address", str(address), "--log-level", "info", "--config", "/dev/null", command="containerd")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(address))
    done = subprocess.run(["ctr", "--address", str(address), "version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Server" in done.stdout


def test_networks_last_without_containers(fresh: Shoal) -> None:
    fresh.up()
    suffix = f"{os.getpid() % 10000:04d}"
    bridge, subnet = f"shb{suffix}", "10.213.77"
    path = fresh.ok("network", "create", f"blue-{suffix}", "--label", "colour=blue").strip()
    try:
        assert Path(path).exists()
        attached = fresh.json(
            "network", "attach", f"blue-{suffix}", "--ip", f"{subnet}.2/24", "--bridge", bridge,
            "--bridge-ip", f"{subnet}.1/24", "--gateway", f"{subnet}.1",
        )  # fmt: skip
        assert attached["addresses"] == [f"{subnet}.2/24"]
        ping = subprocess.run(
            ["nsenter", f"--net={path}", "busybox", "ping", "-c1", "-W2", f"{subnet}.1"],
            check=False,
            capture_output=True,
        )
        assert ping.returncode == 0, ping.stdout
        (listed,) = fresh.json("network", "ls")
        assert listed == fresh.json("network", "inspect", f"blue-{suffix}")
        assert listed["labels"] == {"colour": "blue"}
        assert f"eth0@{bridge}" in fresh.ok("network", "ls")
        fresh.ok("network", "detach", f"blue-{suffix}")
        assert fresh.json("network", "inspect", f"blue-{suffix}")["attachments"] == []
        again = fresh.run("network", "create", f"blue-{suffix}")
        assert (again.returncode, again.stderr.count("\n")) == (5, 1)
    finally:
        fresh.ok("network", "rm", f"blue-{suffix}")
    assert not Path(path).exists()
    missing = fresh.run("network", "inspect", f"blue-{suffix}")
    assert (missing.returncode, missing.stderr.count("\n")) == (4, 1)


def test_events_are_told_live_and_replayed(fresh: Shoal) -> None:
    fresh.up()
    name = f"green-{os.getpid()}"
    subscriber = fresh.spawn("events", "--json", "--since", "1m", stdout=subprocess.PIPE)
    assert subscriber.stdout is not None
    try:
        fresh.ok("network", "create", name)
        fresh.ok("network", "rm", name)
        live = [json.loads(subscriber.stdout.readline()) for _ in range(2)]
    finally:
        subscriber.send_signal(signal.SIGINT)
        assert subscriber.wait(20) == 130
    assert [(event["topic"], event["id"]) for event in live] == [("/networks/create", name), ("/networks/delete", name)]
    replayed = fresh.ok("events", "--json", "--since", "10m", "--no-follow", "--filter", "topic=/networks/delete")
    assert [json.loads(line) for line in replayed.splitlines()] == live[1:]
    assert fresh.ok("events", "--no-follow", "--filter", "id=nobody") == ""
    assert fresh.ok("events", "--no-follow", "--namespace", "elsewhere") == ""
    assert name in fresh.ok("events", "--no-follow", "--all-namespaces")
