"""`pause`, `resume`, `update`, `checkpoint`, `kill` and what they are refused for, as a person at a shell has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.shoal import Shoal, eventually, refused, unique


@pytest.fixture(scope="module")
def stopped(node: Shoal, image: str) -> str:
    """The id of a container whose process has ended."""
    id = unique("stopped")
    node.ok("run", "-d", "--name", id, image, "true")
    eventually(lambda: node.json("inspect", id)["task"]["status"] == "stopped")
    return id


@pytest.fixture
def paused(node: Shoal, box: str) -> Iterator[str]:
    assert node.ok("pause", box) == f"{box}\n"
    yield box
    node.run("resume", box)


def limit(pid: int, controller: str, v1: str, v2: str) -> str:
    """What the file of a cgroup's controller says, of either version."""
    paths = {
        name: path
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        for names, path in [line.split(":", 2)[1:]]
        for name in names.split(",")
    }
    root = Path("/sys/fs/cgroup")
    return (
        root / controller / paths[controller][1:] / v1 if controller in paths else root / paths[""][1:] / v2
    ).read_text()


def test_a_paused_container_is_listed_so_and_takes_nothing_in(node: Shoal, box: str, paused: str) -> None:
    assert re.search(rf"^{box} .* paused ", node.ok("ps"), re.MULTILINE)
    refused(node.run("exec", box, "true"), 125, "FAILED_PRECONDITION", "paused", "running one")
    refused(node.run("pause", box), 7, "FAILED_PRECONDITION", "is paused, not running")
    assert [one["command"] for one in node.json("top", box)] == ["sleep 100000"]
    assert node.json("stats", box, "--interval", "0.1")[0]["container_id"] == box
    assert node.ok("resume", box) == f"{box}\n"
    assert re.search(rf"^{box} .* running ", node.ok("ps"), re.MULTILINE)
    refused(node.run("resume", box), 7, "FAILED_PRECONDITION", "is running, not paused")


def test_limits_are_those_of_the_cgroup(node: Shoal, box: str) -> None:
    pid = node.json("inspect", box)["task"]["pid"]
    node.ok("update", "--memory", "64m", "--memory-swap", "128m", "--cpus", "0.5", "--pids-limit", "50", box)
    assert limit(pid, "memory", "memory.limit_in_bytes", "memory.max").strip() == str(64 << 20)
    assert limit(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert limit(pid, "pids", "pids.max", "pids.max").strip() == "50"
    node.ok("update", "--pids-limit", "20", "--cpuset-cpus", "0", box)
    assert limit(pid, "memory", "memory.limit_in_bytes", "memory.max").strip() == str(64 << 20)  # it stays
    assert limit(pid, "pids", "pids.max", "pids.max").strip() == "20"
    assert limit(pid, "cpuset", "cpuset.cpus", "cpuset.cpus").strip() == "0"
    assert node.json("stats", box, "--interval", "0.1")[0]["memory"]["limit"] == 64 << 20
    resources = node.json("inspect", box)["spec"]["linux"]["resources"]
    assert (resources["memory"]["limit"], resources["pids"]["limit"]) == (64 << 20, 20)
    refused(
        node.run("update", "--memory", "4k", box), 7, "FAILED_PRECONDITION", "OCI runtime update failed", "memory limit"
    )
    node.ok("update", "--memory", "-1", "--memory-swap", "-1", "--pids-limit", "-1", box)
    assert limit(pid, "pids", "pids.max", "pids.max").strip() == "max"
    assert node.run("exec", box, "true").returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to change"),
        (["--memory", "much"], "--memory 'much'"),
        (["--cpus", "0"], "--cpus 0"),
        (["--cpu-shares", "-5"], "shares"),
    ],
)
def test_limits_that_are_none_are_refused(node: Shoal, box: str, options: list[str], words: str) -> None:
    refused(node.run("update", *options, box), 2, "INVALID_ARGUMENT", words)


def test_a_checkpoint_is_written_or_criu_says_why_not(node: Shoal, box: str, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "checkpoint"
    done = node.run("checkpoint", box, str(place))
    if done.returncode == 0:  # where criu works
        assert done.stdout == f"{place}\n"
        assert (place / "inventory.img").exists()
    else:
        refused(done, 7, "FAILED_PRECONDITION", "OCI runtime checkpoint failed", "criu")
        assert not place.exists()
    assert node.run("exec", box, "true").returncode == 0
    refused(node.run("checkpoint", box, "/proc/nowhere"), 7, "FAILED_PRECONDITION", "/proc/nowhere", "No such file")


@pytest.mark.parametrize(
    "command",
    [
        ["pause"], ["resume"], ["update", "--pids-limit", "5"], ["kill"], ["top"], ["checkpoint"],
    ],
)  # fmt: skip
def test_what_does_not_run_is_left_alone(node: Shoal, stopped: str, tmp_path: Path, command: list[str]) -> None:
    place = [str(tmp_path / "checkpoint")] if command == ["checkpoint"] else []
    refused(node.run(*command, stopped, *place), 4, "NOT_FOUND", "has already finished")
    refused(node.run(*command, "nobody", *place), 4, "NOT_FOUND", "container nobody: not found")
    assert list(tmp_path.iterdir()) == []


def test_each_of_several_has_its_turn(node: Shoal, box: str, stopped: str) -> None:
    done = node.run("pause", "nobody", stopped, box)
    assert (done.returncode, done.stdout) == (4, f"{box}\n")
    assert done.stderr.count("\n") == 2
    node.ok("resume", box)


def test_signals_have_names_and_numbers(node: Shoal, image: str) -> None:
    script = "trap 'exit 41' USR1; trap 'exit 42' 40; echo ready; while :; do sleep 0.05; done"
    id = unique("signalled")
    for signal, status in (("sigusr1", 41), ("40", 42)):
        with node.spawn("run", "--name", id, image, "sh", "-c", script, stdout=-1) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            node.ok("kill", "-s", signal, id)
            assert running.wait(30) == status
        node.ok("rm", id)
    for wrong in ("FOO", "99", "0", "-1", ""):
        refused(node.run("kill", f"--signal={wrong}", id), 2, "INVALID_ARGUMENT", "no such signal")


def test_a_name_is_used_once_and_what_runs_is_not_removed(node: Shoal, image: str, box: str) -> None:
    refused(node.run("run", "--name", box, image, "true"), 125, "ALREADY_EXISTS", f"container {box}: already exists")
    refused(node.run("rm", box), 7, "FAILED_PRECONDITION", "is running", "stop it first")
    assert node.run("exec", box, "true").returncode == 0


def test_a_command_that_is_not_one_leaves_no_container(node: Shoal, image: str) -> None:
    before, id = node.json("ps", "--all"), unique("never")
    for command, status, words in (
        ("nope", 127, 'exec: "nope": executable file not found in $PATH'),
        ("/nope", 127, "no such file or directory"),
        ("/etc/passwd", 126, 'exec: "/etc/passwd": permission denied'),
    ):
        refused(node.run("run", "--name", id, image, command), status, "FAILED_PRECONDITION", "runc", words)
        refused(node.run("run", "-d", "--name", id, image, command), status, "FAILED_PRECONDITION", "runc", words)
    assert node.json("ps", "--all") == before
