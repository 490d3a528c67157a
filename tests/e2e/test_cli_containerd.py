"""`shoal containerd`: a node behind containerd's flags and configuration file, for containerd's own clients."""

from __future__ import annotations

import json
import lzma
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.e2e.shoal import COMMAND, Shoal, eventually, refused, unique
from tests.support.gateway import ctr, lines_of
from tests.support.images import Image, Layer, digest_of, file, push
from tests.support.leaks import Leaks
from tests.support.registry import running

CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
oom_score = {oom_score}
colour = "red"
[grpc]
address = "{address}"
uid = {uid}
gid = {gid}
[cgroup]
path = "{cgroup}"
[stream_processors."xz"]
accepts = ["application/vnd.oci.image.layer.v1.tar+xz"]
returns = "application/vnd.oci.image.layer.v1.tar"
path = "xz"
args = ["-dc"]
[plugins."io.containerd.internal.v1.restart"]
interval = "500ms"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "mine"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine.options]
BinaryName = "{runtime}"
"""
NOBODY, DAEMON = 65534, 1
OOM_SCORE = 321
"""More than this process has, so that it can be set without CAP_SYS_RESOURCE."""
RUNC = shutil.which("runc")
"""By its path, which is another default than the node's own."""


class Containerd(Shoal):
    """`shoal containerd --config …`, which says all the rest."""

    @property
    def address(self) -> Path:
        return self.state / "containerd.sock"

    def start(self, *arguments: str, uid: int = NOBODY, gid: int = DAEMON, cgroup: str = "") -> None:
        config = self.directory / "config.toml"
        config.write_text(
            CONFIG.format(
                root=self.root, state=self.state, address=self.address, uid=uid, gid=gid, runtime=RUNC,
                oom_score=OOM_SCORE, cgroup=cgroup,
            )
        )  # fmt: skip
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
    assert [one.partition(": ")[0] for one in warned] == ["colour"]
    assert {record["level"] for record in node.events("configuration.ignored")} == {"warning"}
    # Its group may use it, and get there.
    as_group = subprocess.run(
        ["ctr", "--address", str(node.address), "version"], capture_output=True, text=True, check=False,
        user=2, group=DAEMON, extra_groups=[],
    )  # fmt: skip
    reachable = all(one.stat().st_mode & stat.S_IXOTH for one in node.address.parents)
    assert not reachable or as_group.returncode == 0, as_group.stderr
    assert stat.S_IMODE(node.state.stat().st_mode) == 0o711


def test_its_processes_are_where_and_as_its_file_says(node: Containerd, busybox: str) -> None:
    cgroup = unique("shoal") + "/node"
    node.start(cgroup=cgroup)
    processes = [node.pid, *node.pids.values()]
    for pid in processes:
        places = [line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        assert set(places) == {f"/{cgroup}"}
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == OOM_SCORE
    node.ok("pull", busybox)
    id = unique("box")
    node.ok("run", "-d", "--name", id, busybox, "sleep", "100000")
    shim = psutil.Process(node.json("inspect", id)["task"]["pid"]).parent()
    assert shim is not None
    assert (shim.name(), Path(f"/proc/{shim.pid}/oom_score_adj").read_text()) == ("shoal-shim", f"{OOM_SCORE + 1}\n")
    # Where containerd has its tasks, for what looks there.
    bundle = node.state / "io.containerd.runtime.v2.task" / "default" / id
    assert json.loads((bundle / "config.json").read_text())["process"]["args"] == ["sleep", "100000"]
    assert (bundle / "rootfs" / "bin").is_dir()
    assert (bundle / "shim-binary-path").read_text() == RUNC
    node.ok("rm", "--force", id)
    assert node.stop(signal.SIGTERM) == 0
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{cgroup.partition('/')[0]}"))


def test_layers_go_through_the_programs_that_its_file_names(node: Containerd, tmp_path: Path) -> None:
    media_type, tar = "application/vnd.oci.image.layer.v1.tar+xz", Layer([file("unpacked", b"by xz")]).tar()
    data = lzma.compress(tar)
    image = Image.build([Layer([file("unpacked", b"by xz")], "none")])
    manifest = json.loads(image.manifest)
    manifest["layers"] = [{"mediaType": media_type, "digest": digest_of(data), "size": len(data)}]
    blobs = {digest: blob for digest, blob in image.blobs.items() if digest not in image.layers}
    image = replace(image, manifest=json.dumps(manifest).encode(), blobs=blobs | {digest_of(data): (media_type, data)})
    node.start()
    with running(tmp_path / "registry") as registry:
        push(image, registry.host, "xz")
        pulled = ctr(node.address, "images", "pull", "--plain-http", f"{registry.host}/xz:latest")
        assert pulled.returncode == 0, pulled.stderr
    assert [one.read_text() for one in (node.root / "snapshot").glob("overlayfs/snapshots/*/fs/unpacked")] == ["by xz"]


def test_a_client_that_finds_the_socket_finds_every_part_and_policies_go_by_the_file(
    node: Containerd, busybox: str
) -> None:
    failing = threading.Event()

    def look_at_once() -> None:
        """As containerd's own client does: it takes a part that failed for a daemon that won't start."""
        eventually(node.address.exists)
        shown = ctr(node.address, "plugins", "ls").stdout.splitlines()[1:]
        if not shown or any(line.split()[-1] not in ("ok", "skip") for line in shown):
            failing.set()

    looking = threading.Thread(target=look_at_once)
    looking.start()
    node.start()
    looking.join()
    assert not failing.is_set()
    node.ok("pull", busybox)
    id = unique("box")
    node.ok("run", "-d", "--name", id, "--restart", "always", busybox, "sleep", "100000")
    # What a client kills is left to it for an interval: the file's.
    first = node.json("inspect", id)["task"]["pid"]
    began = time.monotonic()
    assert ctr(node.address, "tasks", "kill", "--signal", "SIGKILL", id).returncode == 0

    def again() -> bool:
        task = node.json("inspect", id)["task"]
        return bool(task) and task["status"] == "running" and task["pid"] != first

    eventually(again)
    assert time.monotonic() - began < 8


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
    assert node.ok("containerd", "--config", str(path), "config", "migrate") == default
    old = tmp_path / "old.toml"
    old.write_text('version = 2\nimports = ["/etc/none/*.toml"]\n[grpc]\naddress = "/run/old.sock"\n')
    migrated = node.ok("containerd", "--config", str(old), "config", "migrate")
    assert migrated == default.replace("/run/containerd/containerd.sock", "/run/old.sock").replace(
        "imports = []", 'imports = ["/etc/none/*.toml"]'
    )


def test_an_oci_hook_is_told_of_its_container(node: Containerd, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"root": {"path": "rootfs"}}')
    state = {"id": "one", "pid": 7, "status": "created", "bundle": str(tmp_path), "annotations": {"k": "v"}}
    command = ["sh", "-c", "echo $A $*; exit 3", "sh", "--pid", "{{pid}}", "{{rootfs}}", '{{annotation "k"}}']
    arguments = ["--config", "/none", "oci-hook", "--", *command]
    done = node.run("containerd", *arguments, stdin=json.dumps(state).encode(), A="{{id}}")
    assert (done.returncode, done.stdout) == (3, f"one --pid 7 {tmp_path}/rootfs v\n"), done.stderr
    bad = node.run("containerd", "oci-hook", "--", "true", stdin=b"[]")
    refused(bad, 2, "INVALID_ARGUMENT", "standard input")
    state["bundle"] = str(tmp_path / "none")
    refused(node.run("containerd", "oci-hook", "true", stdin=json.dumps(state).encode()), 4, "NOT_FOUND", "config.json")
