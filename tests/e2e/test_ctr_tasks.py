"""Debian's ctr runs containers through the gateway: what it prints is what it prints against Debian's containerd."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.ctr import Side, ours_of, running_theirs, same
from tests.e2e.shoal import unique
from tests.e2e.terminal import Terminal
from tests.support import bundle
from tests.support.gateway import lines_of
from tests.support.gateway_tasks import GatewayNode, gateway_node

UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayNode]:
    directory = tmp_path_factory.mktemp("n")
    with gateway_node(directory, "content", "snapshot") as made:
        yield made


@pytest.fixture
def ours(node: GatewayNode) -> Side:
    return ours_of(node)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    with running_theirs(tmp_path_factory) as side:
        yield side


def run(*arguments: str, flags: Sequence[str] = ()) -> tuple[str, ...]:
    return ("run", "--rm", *flags, "--rootfs", "ROOTFS", "box", *arguments)


STATUS = ("/bin/grep", "-E", "^(Seccomp|NoNewPrivs|Cap...|Uid):", "/proc/self/status")
RUNS = [
    run("/bin/echo", "hello"),
    run("/bin/sh", "-c", "echo out; echo err >&2; exit 3"),
    run("/bin/cat", "/proc/1/cmdline"),
    run("/bin/env", flags=["--env", "A=b", "--env", "C=d e"]),
    run("/bin/pwd", flags=["--cwd", "/tmp"]),
    run("/bin/touch", "/written", flags=["--read-only"]),
    run("/bin/sh", "-c", "echo x >/tmp/x && cat /tmp/x"),
    run("/bin/ls", "/here", flags=["--mount", "type=bind,src=ROOTFS,dst=/here,options=rbind:ro"]),
    run("/bin/touch", "/here/x", flags=["--mount", "type=bind,src=ROOTFS,dst=/here,options=rbind:ro"]),
    run("/bin/sh", "-c", "df -k /scratch | tail -n 1 | wc -l", flags=["--mount", "type=tmpfs,src=tmpfs,dst=/scratch"]),
    run(*STATUS),
    run(*STATUS, flags=["--seccomp", "--allow-new-privs"]),
    run(*STATUS, flags=["--cap-add", "CAP_NET_ADMIN", "--cap-drop", "CAP_CHOWN"]),
    run(*STATUS, flags=["--privileged"]),
    run("/bin/hostname"),
    run("/bin/ls", "/sys/class/net"),
    run("/bin/ls", "-l", "/proc/self/ns/net", flags=["--net-host"]),
    run("/bin/sh", "-c", "kill -9 $$"),
    run("/bin/nothing404"),
    run("nothing404"),
    run("/etc"),
    run("/bin/true", flags=["--no-pivot"]),
    run("/bin/true", flags=["--mount", "type=bind,src=/nowhere,dst=/here,options=rbind"]),
    run("/bin/true", flags=["--cap-add", "CAP_NOTHING"]),
    ("tasks", "ls"),
    ("containers", "ls"),
]


@pytest.mark.parametrize("command", RUNS, ids=[" ".join(one)[9:60] for one in RUNS])
def test_ctr_run_prints_what_it_prints_against_containerd(ours: Side, theirs: Side, command: tuple[str, ...]) -> None:
    try:
        same(ours, theirs, *command)
    finally:
        for side in (ours, theirs):  # a container whose task couldn't be made stays, with either
            side.ctr("containers", "rm", "box")


SESSION = [
    ("run", "--detach", "--null-io", "--label", "team=blue", "--env", "A=b", "--rootfs", "ROOTFS",
     "web", "/bin/sleep", "600"),
    ("run", "--detach", "--null-io", "--rootfs", "ROOTFS", "web", "/bin/true"),
    ("containers", "ls"),
    ("containers", "ls", "-q"),
    ("containers", "ls", "id==web"),
    ("containers", "ls", "labels.team==red"),
    ("containers", "ls", "id=="),
    ("tasks", "ls"),
    ("tasks", "ls", "-q"),
    ("tasks", "ps", "web"),
    ("tasks", "exec", "--exec-id", "a", "web", "/bin/echo", "from exec"),
    ("tasks", "exec", "--exec-id", "b", "--cwd", "/tmp", "web", "/bin/sh", "-c", "pwd; echo $A; exit 5"),
    ("tasks", "exec", "--exec-id", "c", "--user", "65534", "web", "/bin/id", "-u"),
    ("tasks", "exec", "--exec-id", "d", "web", "/bin/nothing404"),
    ("tasks", "exec", "--exec-id", "e", "--detach", "web", "/bin/sleep", "500"),
    ("tasks", "exec", "--exec-id", "e", "--detach", "web", "/bin/sleep", "500"),
    ("tasks", "kill", "--exec-id", "e", "--signal", "KILL", "web"),
    ("tasks", "kill", "--exec-id", "nothing", "web"),
    ("tasks", "rm", "--exec-id", "e", "web"),
    ("tasks", "rm", "--exec-id", "e", "web"),
    ("tasks", "pause", "web"),
    ("tasks", "ls"),
    ("tasks", "resume", "web"),
    ("tasks", "ls"),
    ("containers", "label", "web", "team=", "stage=test"),
    ("containers", "ls", "labels.stage==test"),
    ("containers", "rm", "web"),
    ("tasks", "rm", "web"),
    ("tasks", "kill", "--signal", "KILL", "web"),
    ("tasks", "kill", "nothing"),
    ("tasks", "ps", "nothing"),
    ("tasks", "metrics", "nothing"),
    ("tasks", "start", "nothing"),
    ("tasks", "attach", "nothing"),
    ("tasks", "exec", "--exec-id", "x", "nothing", "/bin/true"),
    ("containers", "info", "nothing"),
    ("containers", "rm", "nothing"),
]  # fmt: skip


def test_a_session_of_ctr_goes_as_it_goes_against_containerd(ours: Side, theirs: Side) -> None:
    for command in SESSION:
        same(ours, theirs, *command)
        if command[:2] == ("tasks", "kill"):
            time.sleep(0.5)  # until the exit has been told, on either side
    for command in [("tasks", "ls"), ("tasks", "rm", "web"), ("tasks", "ls"), ("containers", "rm", "web")]:
        same(ours, theirs, *command)
    same(ours, theirs, "containers", "ls")


def test_ctr_containers_info_is_that_of_containerd(ours: Side, theirs: Side) -> None:
    shown = []
    for side in (theirs, ours):
        side.detached("info", flags=["--label", "a=b", "--memory-limit", "33554432"])
        told = json.loads(side.ok("containers", "info", "info"))
        for name in ("CreatedAt", "UpdatedAt"):
            assert re.fullmatch(r"20\d\d-.*Z", told.pop(name))
        text = json.dumps(told).replace(str(side.rootfs), "ROOTFS").replace(side.namespace, "NAMESPACE")
        shown.append(json.loads(text))
        side.end("info")
    assert shown[1] == shown[0]


def test_a_runtime_that_isnt_there_is_named(ours: Side, theirs: Side) -> None:
    for side in (ours, theirs):
        failed = side.ctr("run", "--rm", "--runc-binary", "no-runc", "--rootfs", "ROOTFS", "box", "/bin/true")
        assert failed.returncode == 1
        assert '"no-runc"' in failed.stderr
        side.ctr("containers", "rm", "box")


def test_limits_are_those_of_the_cgroup(ours: Side) -> None:
    ours.detached("limits", flags=["--memory-limit", "33554432", "--cpus", "0.5", "--cpu-shares", "256"])
    pid = ours.pid("limits")
    found = {
        controller: line.split(":")[2]
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        for controller in line.split(":")[1].split(",")
    }
    if UNIFIED:
        place = Path(f"/sys/fs/cgroup{found['']}")
        assert (place / "memory.max").read_text().strip() == "33554432"
        assert (place / "cpu.max").read_text().split() == ["50000", "100000"]
    else:
        assert (Path("/sys/fs/cgroup/memory" + found["memory"]) / "memory.limit_in_bytes").read_text() == "33554432\n"
        assert (Path("/sys/fs/cgroup/cpu" + found["cpu"]) / "cpu.cfs_quota_us").read_text() == "50000\n"
        assert (Path("/sys/fs/cgroup/cpu" + found["cpu"]) / "cpu.shares").read_text() == "256\n"
    ours.end("limits")


def test_metrics_are_told_as_containerd_tells_them(ours: Side, theirs: Side) -> None:
    def shape(side: Side) -> list[str]:
        side.detached("measured")
        lines = side.ok("tasks", "metrics", "measured").splitlines()
        told = json.loads(side.ok("tasks", "metrics", "--format", "json", "measured"))
        side.end("measured")
        return [line.split()[0] for line in lines if line.strip()] + sorted(told)

    assert shape(ours) == shape(theirs)


def test_events_come_in_the_order_containerd_has(ours: Side, theirs: Side, tmp_path: Path) -> None:
    def topics(side: Side) -> list[str]:
        path = tmp_path / side.namespace
        with path.open("wb") as file:
            watching = command(side, "events", f"namespace=={side.namespace}")
            following = subprocess.Popen(watching, stdout=file)
        try:
            deadline = time.monotonic() + 20
            while b"warm" not in path.read_bytes():  # until it hears
                side.run("warm", "/bin/true")
                assert time.monotonic() < deadline
            side.ctr("run", "--rm", "--rootfs", "ROOTFS", "told", "/bin/sh", "-c", "exit 3")
            while not lines_of(path.read_bytes(), "told", "/containers/delete"):
                assert time.monotonic() < deadline, path.read_text()
                time.sleep(0.05)
        finally:
            following.send_signal(signal.SIGINT)
            following.wait(10)
        return [line.split()[5] for line in lines_of(path.read_bytes(), "told")]

    assert topics(ours) == topics(theirs)
    assert topics(ours) == [
        "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------- streams and terminals


def command(side: Side, *arguments: str) -> list[str]:
    filled = [one.replace("ROOTFS", str(side.rootfs)) for one in arguments]
    return ["ctr", "--address", str(side.socket), "--namespace", side.namespace, *filled]


def test_what_is_piped_in_comes_out(ours: Side) -> None:
    piped = subprocess.run(
        command(ours, "run", "--rm", "--rootfs", "ROOTFS", "pipe", "/bin/cat"),
        input=b"line\n" * 50_000, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert piped.stdout == b"line\n" * 50_000


def test_a_run_with_a_terminal_is_typed_at_and_resized(node: GatewayNode, ours: Side) -> None:
    id = unique("tty")
    arguments = ("run", "--rm", "--tty", "--rootfs", "ROOTFS", id, "/bin/sh")
    with Terminal(node.node, command=command(ours, *arguments), rows=30, columns=100) as terminal:
        terminal.until(b"# ")
        terminal.type(b"PATH=/bin; until stty size; do sleep 0.1; done; tty\r")  # ctr sizes it a moment after its start
        terminal.until(b"30 100\r")
        terminal.until(b"/dev/pts/0")
        terminal.type(b"sleep 0.5; echo is  listening\r")
        terminal.until(b"is listening\r")  # ctr hears of no change before its own first resizing has been answered
        terminal.resize(41, 121)
        terminal.type(b"sleep 0.3; stty size\r")
        terminal.until(b"41 121\r")
        terminal.type(b"exit 9\r")
        assert terminal.ends() == 9
    assert ours.ok("containers", "ls", "-q", f"id=={id}") == ""


def test_an_exec_with_a_terminal_and_an_attach(node: GatewayNode, ours: Side) -> None:
    detach = ("run", "--detach", "--tty", "--rootfs", "ROOTFS", "held", "/bin/sh")
    with Terminal(node.node, command=command(ours, *detach)) as terminal:  # ctr wants one of its own for that
        assert terminal.ends() == 0
    exec_it = ("tasks", "exec", "--exec-id", "shell", "--tty", "held", "/bin/sh")
    with Terminal(node.node, command=command(ours, *exec_it), rows=25, columns=90) as terminal:
        terminal.until(b"# ")
        terminal.type(b"echo $((6 * 7)); exit 4\r")
        terminal.until(b"\n42\r")
        assert terminal.ends() == 4
    with Terminal(node.node, command=command(ours, "tasks", "attach", "held")) as terminal:
        terminal.until_raw()
        terminal.type(b"echo $((7 * 8)); exit 6\r")
        terminal.until(b"\n56\r")
        assert terminal.ends() == 6
    ours.ctr("tasks", "rm", "held")
    ours.ok("containers", "rm", "held")


def test_a_container_that_was_created_is_started(ours: Side, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    spec = bundle.spec(["sh", "-c", "echo started; exit 2"])
    spec["root"]["path"] = str(ours.rootfs)
    config.write_text(json.dumps(spec))
    ours.ok("containers", "create", "--config", str(config), "made")
    assert "io.containerd.runc.v2" in ours.ok("containers", "ls", "id==made")
    started = ours.ctr("tasks", "start", "--pid-file", str(tmp_path / "pid"), "made")
    assert (started.stdout, started.returncode) == ("started\n", 2)
    assert int((tmp_path / "pid").read_text()) > 1
    ours.ok("containers", "rm", "made")


def test_a_log_uri_is_written_to(ours: Side, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ours.run("logs", "/bin/echo", "logged", flags=("--detach", "--log-uri", f"file://{log}"))
    deadline = time.monotonic() + 20
    while not log.exists() or log.read_text() != "logged\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ours.end("logs")


def test_ctrl_c_reaches_the_container_and_a_killed_client_leaves_it_alone(ours: Side) -> None:
    # ctr passes signals on a moment after the process has begun.
    script = "trap 'echo heard; exit 5' INT; sleep 0.5; echo ready; while :; do sleep 0.05; done"
    env = ("--env", "PATH=/bin")
    attached = subprocess.Popen(
        command(ours, "run", "--rm", *env, "--rootfs", "ROOTFS", "int", "/bin/sh", "-c", script),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert attached.stdout is not None
    assert attached.stdout.readline() == "ready\n"
    attached.send_signal(signal.SIGINT)
    rest, _ = attached.communicate(timeout=30)
    assert (rest, attached.returncode) == ("heard\n", 5)
    orphan = subprocess.Popen(
        command(ours, "run", *env, "--rootfs", "ROOTFS", "orphan", "/bin/sh", "-c", "echo ready; exec sleep 600"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert orphan.stdout is not None
    assert orphan.stdout.readline() == "ready\n"
    orphan.kill()
    orphan.communicate(timeout=30)
    assert " RUNNING" in ours.ok("tasks", "ls")
    ours.end("orphan")


def test_checkpoints_fail_as_they_do_without_criu(ours: Side, theirs: Side, tmp_path: Path) -> None:
    for side in (ours, theirs):
        side.detached("cold")
        for flags in ((), ("--image-path", str(tmp_path / "images"))):
            failed = side.ctr("tasks", "checkpoint", *flags, "cold")
            assert failed.returncode == 1
            assert "criu" in failed.stderr
        assert " RUNNING" in side.ok("tasks", "ls")
        side.end("cold")


def test_nothing_that_was_refused_left_a_traceback(node: GatewayNode) -> None:
    for service in ("gateway", "runtime"):
        assert "Traceback" not in node.node.of(service).log.read_text()
