"""Debian's dockerd with the gateway for its containerd: what people do with docker, and restarts on either side."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateway_tasks import GatewayNode, gateway_node
from tests.support.leaks import mounts, remove_cgroups

START_SECONDS = 40.0


class Docker:
    """A dockerd on directories of its own, started and killed at will."""

    def __init__(self, directory: Path, containerd: Path) -> None:
        self.directory, self._containerd = directory, containerd
        self.host = f"unix://{directory}/docker.sock"
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            "dockerd", "--containerd", str(self._containerd), "--host", self.host, "--live-restore",
            "--data-root", str(self.directory / "root"), "--exec-root", str(self.directory / "exec"),
            "--pidfile", str(self.directory / "pid"), "--storage-driver", "vfs", "--bridge", "none", "--iptables=false",
            "--cgroup-parent", f"/{self.directory.name}",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while self.docker("version").returncode:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(30)

    def docker(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["docker", "--host", self.host, *arguments]
        return subprocess.run(command, input=input, capture_output=True, text=True, timeout=50, check=False)

    def ok(self, *arguments: str, input: str | None = None) -> str:
        done = self.docker(*arguments, input=input)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def run(self, *arguments: str) -> str:
        return self.ok("run", "--network", "none", *arguments).strip()

    def inspected(self, name: str, field: str) -> str:
        return self.ok("inspect", "--format", f"{{{{.{field}}}}}", name).strip()

    def until(self, name: str, field: str, value: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.inspected(name, field)) != value:
            assert time.monotonic() < deadline, f"{name}: {field} is {found}, not {value}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    with gateway_node(tmp_path_factory.mktemp("n"), "content") as made:
        made.namespace = "moby"
        yield made


@contextmanager
def running(containerd: Path) -> Iterator[Docker]:
    with tempfile.TemporaryDirectory(prefix="shoal-dockerd-", dir="/tmp") as directory:  # a socket's path is short
        docker = Docker(Path(directory), containerd)
        docker.start()
        try:
            yield docker
        finally:
            for id in docker.ok("ps", "--all", "--quiet").split():
                docker.docker("rm", "--force", id)
            docker.end()
            for place in sorted((path for path in mounts() if directory in path), reverse=True):
                subprocess.run(["umount", "--lazy", place], check=False)
            remove_cgroups(docker.directory.name)


@pytest.fixture(scope="module")
def docker(node: GatewayNode) -> Iterator[Docker]:
    with running(node.socket) as started:
        archive = subprocess.run(["tar", "-C", str(node.rootfs), "-c", "."], capture_output=True, check=True).stdout
        importing = ["docker", "--host", started.host, "import", "--change", "ENV PATH=/bin", "-", "box"]
        subprocess.run(importing, input=io.BytesIO(archive).read(), capture_output=True, check=True)
        yield started


def test_docker_run_shows_output_and_status(docker: Docker) -> None:
    assert docker.run("--rm", "box", "echo", "hello") == "hello"
    for command, status in ((("sh", "-c", "exit 3"), 3), (("nothing404",), 127), (("/etc",), 126)):
        assert docker.docker("run", "--rm", "--network", "none", "box", *command).returncode == status
    piped = docker.ok("run", "--rm", "--interactive", "--network", "none", "box", "cat", input="piped")
    assert piped == "piped"
    assert docker.ok("ps", "--all", "--quiet") == ""


def test_a_container_is_watched_entered_frozen_limited_and_stopped(docker: Docker) -> None:
    docker.run("--detach", "--name", "web", "--memory", "64m", "box", "sh", "-c", "echo begun; exec sleep 600")
    assert docker.ok("logs", "web") == "begun\n"
    assert docker.ok("exec", "web", "echo", "within") == "within\n"
    assert docker.docker("exec", "web", "sh", "-c", "exit 5").returncode == 5
    assert docker.docker("exec", "web", "nothing404").returncode in (126, 127)
    assert docker.ok("exec", "--interactive", "web", "cat", input="x" * 100_000) == "x" * 100_000
    assert "sleep 600" in docker.ok("top", "web")
    stats = json.loads(docker.ok("stats", "--no-stream", "--format", "{{json .}}", "web"))
    assert stats["MemUsage"].endswith("/ 64MiB")
    assert int(stats["PIDs"]) == 1
    docker.ok("pause", "web")
    assert docker.inspected("web", "State.Status") == "paused"
    docker.ok("unpause", "web")
    docker.ok("update", "--memory", "48m", "web")
    stats = json.loads(docker.ok("stats", "--no-stream", "--format", "{{json .}}", "web"))
    assert stats["MemUsage"].endswith("/ 48MiB")
    docker.ok("stop", "--time", "1", "web")
    assert docker.inspected("web", "State.ExitCode") == "137"
    docker.ok("start", "web")
    assert docker.inspected("web", "State.Running") == "true"
    docker.ok("restart", "--time", "0", "web")
    assert docker.inspected("web", "State.Running") == "true"
    docker.ok("rm", "--force", "web")


def test_events_come_in_order(docker: Docker) -> None:
    since = str(int(time.time()))
    docker.run("--name", "told", "box", "true")
    docker.ok("rm", "told")
    shown = docker.ok("events", "--since", since, "--until", str(int(time.time()) + 1), "--filter", "container=told",
                      "--format", "{{.Action}}")  # fmt: skip
    assert [one for one in shown.split() if one in ("create", "start", "die", "destroy")] == [
        "create", "start", "die", "destroy",
    ]  # fmt: skip


def test_a_restart_policy_starts_it_again(docker: Docker) -> None:
    docker.run("--detach", "--name", "again", "--restart", "on-failure:2", "box", "sh", "-c", "exit 4")
    docker.until("again", "RestartCount", "2")
    docker.until("again", "State.Status", "exited")
    assert docker.inspected("again", "State.ExitCode") == "4"
    docker.ok("rm", "again")


def test_running_out_of_memory_is_told(docker: Docker) -> None:
    docker.run("--detach", "--name", "oom", "--memory", "16m", "box", "sh", "-c", "exec tail -c 100000000 /dev/zero")
    docker.until("oom", "State.Status", "exited")
    assert (docker.inspected("oom", "State.OOMKilled"), docker.inspected("oom", "State.ExitCode")) == ("true", "137")
    docker.ok("rm", "oom")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_containers_outlive_dockerd(docker: Docker, number: signal.Signals) -> None:
    docker.run("--detach", "--name", "lives", "box", "sleep", "600")
    pid = docker.inspected("lives", "State.Pid")
    docker.end(number)
    docker.start()
    assert (docker.inspected("lives", "State.Status"), docker.inspected("lives", "State.Pid")) == ("running", pid)
    assert docker.ok("exec", "lives", "echo", "still") == "still\n"
    docker.ok("kill", "lives")
    docker.until("lives", "State.ExitCode", "137")
    docker.ok("rm", "lives")


def test_containers_outlive_shoal_and_their_end_is_heard(node: GatewayNode, docker: Docker) -> None:
    docker.run("--detach", "--name", "held", "box", "sleep", "600")
    pid = docker.inspected("held", "State.Pid")
    for name in ("gateway", "runtime"):
        service = node.node.of(name)
        service.kill()
        service.start()
    deadline = time.monotonic() + 30
    while docker.docker("exec", "held", "true").returncode:  # until dockerd has connected again
        assert time.monotonic() < deadline, docker.log.read_text()[-2000:]
        time.sleep(0.2)
    assert docker.inspected("held", "State.Pid") == pid
    docker.ok("kill", "held")
    docker.until("held", "State.Status", "exited")
    docker.ok("rm", "held")


def test_nothing_that_was_refused_left_a_traceback(node: GatewayNode) -> None:
    for service in ("gateway", "runtime"):
        assert "Traceback" not in node.node.of(service).log.read_text()
