"""`shoal containerd`: a node behind containerd's flags and configuration file, for containerd's own clients."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.shoal import COMMAND, Shoal, refused, unique
from tests.support.gateway import ctr, lines_of
from tests.support.leaks import Leaks

CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
oom_score = -999
colour = "red"
[grpc]
address = "{address}"
uid = {uid}
gid = {gid}
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "mine"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine.options]
BinaryName = "{runtime}"
"""
NOBODY, DAEMON = 65534, 1
RUNC = shutil.which("runc")
"""By its path, which is another default than the node's own."""


class Containerd(Shoal):
    """`shoal containerd --config …`, which says all the rest."""

    @property
    def address(self) -> Path:
        return self.state / "containerd.sock"

    def start(self, *arguments: str, uid: int = NOBODY, gid: int = DAEMON) -> None:
        config = self.directory / "config.toml"
        config.write_text(
            CONFIG.format(root=self.root, state=self.state, address=self.address, uid=uid, gid=gid, runtime=RUNC)
        )
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "containerd", "--config", str(config), *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.wait_for("node.up", 60)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Containerd]:
    leaks = Leaks(str(tmp_path))
    with Containerd(tmp_path) as made:
        yield made
    leaks.check()


def test_a_node_as_its_file_says(node: Containerd) -> None:
    node.start()
    shown = ctr(node.address, "version")
    assert shown.returncode == 0, shown.stderr
    assert lines_of(shown.stdout.partition("Server:")[2], "Revision:", "shoal")
    found = node.address.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, DAEMON, 0o660)
    warned = [record["what"] for record in node.events("configuration.ignored")]
    assert [one.partition(": ")[0] for one in warned] == ["oom_score", "colour"]
    assert {record["level"] for record in node.events("configuration.ignored")} == {"warning"}
    # Its group may use it, and get there.
    as_group = subprocess.run(
        ["ctr", "--address", str(node.address), "version"], capture_output=True, text=True, check=False,
        user=2, group=DAEMON, extra_groups=[],
    )  # fmt: skip
    reachable = all(one.stat().st_mode & stat.S_IXOTH for one in node.address.parents)
    assert not reachable or as_group.returncode == 0, as_group.stderr
    assert stat.S_IMODE(node.state.stat().st_mode) == 0o711


def test_flags_win_over_the_file_and_others_are_kept_out(node: Containerd, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "c.sock"
    node.start("--address", str(elsewhere), "--log-level", "debug", uid=0, gid=0)
    assert ctr(elsewhere, "version").returncode == 0
    assert not node.address.exists()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o660
    as_nobody = subprocess.run(
        ["ctr", "--address", str(elsewhere), "--connect-timeout", "1s", "version"],
        capture_output=True, check=False, user=NOBODY, group=NOBODY, extra_groups=[],
    )  # fmt: skip
    assert as_nobody.returncode != 0
    second = node.run("containerd", "--config", str(tmp_path / "config.toml"))
    refused(second, 7, "FAILED_PRECONDITION", "a node is up", str(node.pid))


def test_sigterm_leaves_containers_running_and_the_next_one_finds_them(node: Containerd, busybox: str) -> None:
    node.start()
    node.ok("pull", busybox)
    id = unique("box")
    node.ok("run", "-d", "--name", id, busybox, "sleep", "100000")
    container = node.json("inspect", id)
    assert (container["runtime"], container["task"]["status"]) == (RUNC, "running")
    pid = container["task"]["pid"]
    assert node.stop(signal.SIGTERM) == 0
    assert not node.address.exists()
    assert psutil.Process(pid).is_running()
    node.start()
    task = node.json("inspect", id)["task"]
    assert (task["pid"], task["status"]) == (pid, "running")
    assert id in ctr(node.address, "tasks", "ls", "-q").stdout.split()


def test_what_is_wrong_with_file_or_flags_is_one_line(node: Containerd, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("version = 2\n[grpc]\nuid = 'root'\n")
    refused(node.run("containerd", "--config", str(bad)), 2, "INVALID_ARGUMENT", "bad.toml", "grpc.uid")
    none = node.run("containerd", "--config", str(tmp_path / "none.toml"))
    refused(none, 4, "NOT_FOUND", "none.toml")
    level = node.run("containerd", "--log-level", "loud")
    assert level.returncode == 2
    assert "loud" in level.stderr
    assert level.stderr.count("\n") == 1


def test_its_configuration_is_printed_and_understood(node: Containerd, tmp_path: Path) -> None:
    default = node.ok("containerd", "config", "default")
    assert 'address = "/run/containerd/containerd.sock"' in default
    path = tmp_path / "default.toml"
    path.write_text(default)
    assert node.ok("containerd", "--config", str(path), "config", "dump") == default
    changed = node.ok("containerd", "--config", str(path), "--root", "/elsewhere", "config", "dump")
    assert 'root = "/elsewhere"' in changed
    assert node.ok("containerd", "--version").startswith("containerd shoal v")
