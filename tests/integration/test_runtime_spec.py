"""What a specification says is what runc makes of it: each option is looked at from inside a real container."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shoal_bus.api import content
from shoal_bus.api import runtime as api
from shoal_bus.errors import InvalidArgument, NotFound
from shoal_bus.types import Stdio
from shoal_runtime.spec import check_spec, generate_spec

from tests.support import bundle, images
from tests.support.natsd import NatsServer
from tests.support.registry import Registry, running
from tests.support.runtime import RuntimeNode, runtime_node

MAP = [{"container_id": 0, "host_id": 100000, "size": 65536}]
PROGRAM = """
import hashlib, os, socket, subprocess, tempfile, threading
done = []
threads = [threading.Thread(target=done.append, args=(n,)) for n in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
a, b = socket.socketpair()
a.sendall(os.urandom(16)), b.recv(16)
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
out = subprocess.run(["/bin/sh", "-c", "echo $((6*7)) | cat"], capture_output=True, text=True).stdout.strip()
try:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
except OSError as error:
    print("AF_ALG", error.errno)
print(len(done), out, os.getpid() > 0)
"""


class Runc:
    """Runs generated specifications of busybox, each to its end."""

    def __init__(self, directory: Path) -> None:
        self._bundle = bundle.bundle(directory / "bundle", {})
        self._state = directory / "state"
        self.rootfs = bundle.busybox_rootfs(self._bundle / "rootfs")
        for applet in ("awk", "chroot", "readlink", "sort", "unshare"):
            (self.rootfs / "bin" / applet).symlink_to("busybox")
        self.namespace = f"shoalspec{secrets.token_hex(4)}"

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        asked = api.SpecOptions.model_validate({"args": command, **options})
        image = {"config": {"Env": ["PATH=/bin"]}}
        spec = generate_spec(self.namespace, "one", image, bundle.bind(self.rootfs), asked)
        check_spec(spec)
        (self._bundle / "config.json").write_text(json.dumps(spec))
        argv = ["runc", "--root", str(self._state), "run", "--bundle", str(self._bundle), self.namespace]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)

    def ok(self, *command: str, **options: Any) -> list[str]:
        """The lines that a command which must succeed has printed."""
        done = self.run(*command, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def sh(self, script: str, **options: Any) -> list[str]:
        return self.ok("sh", "-c", script, **options)

    def close(self) -> None:
        """Removes the cgroups that runc leaves above its own."""
        for directory, names, _ in os.walk("/sys/fs/cgroup", topdown=False):
            for name in names:
                if self.namespace in f"{directory}/{name}":
                    with suppress(FileNotFoundError):
                        (Path(directory) / name).rmdir()


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    made = Runc(tmp_path)
    yield made
    made.close()


def status(lines: list[str]) -> dict[str, str]:
    """/proc/self/status, field by field."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespace(path: str) -> str:
    """Which namespace a link of /proc is to, as ipc:[4026531839]."""
    return str(Path(path).readlink())


# ------------------------------------------------------------------------------------------------------------- seccomp


def test_the_default_profile_keeps_a_container_from_what_it_has_no_business_with(runc: Runc) -> None:
    assert status(runc.ok("cat", "/proc/self/status"))["Seccomp"] == "2"
    blocked = runc.run("unshare", "-U", "true")
    assert blocked.returncode != 0
    assert "Operation not permitted" in blocked.stderr
    assert runc.run("unshare", "-U", "true", seccomp="unconfined").returncode == 0


def test_the_default_profile_goes_with_capabilities(runc: Runc) -> None:
    assert runc.run("mount", "-t", "tmpfs", "tmpfs", "/tmp").returncode != 0
    assert runc.run("mount", "-t", "tmpfs", "tmpfs", "/tmp", cap_add=["SYS_ADMIN"]).returncode == 0
    assert runc.run("chroot", "/", "true").returncode == 0
    assert runc.run("chroot", "/", "true", cap_drop=["SYS_CHROOT"]).returncode != 0


def test_ordinary_programs_do_not_notice_the_default_profile(runc: Runc) -> None:
    script = (
        "ls / | sort | head -1; ping -c1 -W2 127.0.0.1 >/dev/null && echo ping; (sleep 9 & kill $!; wait); "
        "echo a > /tmp/a; chown 5:6 /tmp/a; cp /tmp/a /tmp/b; mv /tmp/b /tmp/c; stat -c %u /tmp/a; "
        "dd if=/dev/zero of=/tmp/d bs=1k count=4 2>/dev/null; sync; date >/dev/null; find /tmp -name d"
    )
    assert runc.sh(script) == ["bin", "ping", "5", "/tmp/d"]


def test_threads_sockets_and_children_of_a_dynamic_program_work_under_it(runc: Runc) -> None:
    python = Path(sys.executable).resolve()
    same = python.stat().st_dev == Path("/").stat().st_dev
    host = {"destination": "/host", "source": "/", "options": ["bind" if same else "rbind", "ro"]}
    temporary = {"destination": "/host/tmp", "type": "tmpfs"}
    lines = runc.ok("chroot", "/host", str(python), "-I", "-c", PROGRAM, mounts=[host, temporary])
    assert lines == ["AF_ALG 1", "4 42 True"]


def test_a_clients_own_profile_is_in_force(runc: Runc) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    }
    refused = runc.run("mkdir", "/tmp/x", seccomp=profile)
    assert refused.returncode != 0
    assert "No space left on device" in refused.stderr
    assert runc.run("mkdir", "/tmp/x").returncode == 0


# ------------------------------------------------------------------------------------------------------------- options


def test_capabilities_are_those_asked_for(runc: Runc) -> None:
    def effective(**options: Any) -> int:
        return int(status(runc.ok("cat", "/proc/self/status", **options))["CapEff"], 16)

    assert effective() == 0xA80425FB
    assert effective(cap_drop=["ALL"]) == 0
    assert effective(cap_drop=["ALL"], cap_add=["CHOWN", "net_admin"]) == 1 | 1 << 12


def test_a_privileged_container_is_kept_from_nothing(runc: Runc) -> None:
    script = (
        "grep -E '^(CapEff|Seccomp):' /proc/self/status; mount -t tmpfs tmpfs /tmp && echo mounted; "
        "cat /proc/sys/kernel/panic > /tmp/panic && cat /tmp/panic > /proc/sys/kernel/panic && echo written; "
        "grep -c ' /sys sysfs rw' /proc/mounts; test -c /dev/kmsg && echo kmsg"
    )
    own = status(Path("/proc/self/status").read_text().splitlines())
    lines = runc.sh(script, privileged=True)
    assert [line.split()[-1] for line in lines[:2]] == [own["CapEff"], "0"]
    kmsg = ["kmsg"] if Path("/dev/kmsg").is_char_device() else []
    assert lines[2:] == ["mounted", "written", "1", *kmsg]


def test_mounts_are_made_with_their_options(runc: Runc, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("from the node\n")
    mounts = [
        {"destination": "/data", "source": str(tmp_path / "data"), "options": ["rbind", "ro"]},
        {"destination": "/file", "source": str(tmp_path / "data/file")},
        {"destination": "/scratch", "type": "tmpfs", "options": ["size=1m", "noexec"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=2m"]},
    ]
    script = (
        "cat /data/file; touch /data/x 2>/dev/null || echo read-only; echo written >> /file; "
        "grep -cE ' /scratch tmpfs .*noexec.*size=1024k' /proc/mounts; "
        "grep -c ' /dev/shm tmpfs .*size=2048k' /proc/mounts"
    )
    assert runc.sh(script, mounts=mounts) == ["from the node", "read-only", "1", "1"]
    assert (tmp_path / "data/file").read_text() == "from the node\nwritten\n"


def test_a_read_only_rootfs_with_paths_masked_and_read_only(runc: Runc) -> None:
    script = "touch /x 2>/dev/null || echo ro; cat /etc/secret; touch /etc/dir/x 2>/dev/null || echo ro; cat /etc/open"
    (runc.rootfs / "etc/secret").write_text("secret\n")
    (runc.rootfs / "etc/open").write_text("open\n")
    (runc.rootfs / "etc/dir").mkdir()
    assert runc.sh(script, read_only=True, masked_paths=["/etc/secret"]) == ["ro", "ro", "open"]
    assert runc.sh(script, masked_paths=["/etc/secret"], readonly_paths=["/etc/dir"]) == ["ro", "open"]


def test_devices_are_made_and_allowed(runc: Runc) -> None:
    device = {"path": "/dev/full", "container_path": "/dev/brimming", "permissions": "rw"}
    assert runc.sh("test -c /dev/brimming && stat -c '%t,%T' /dev/brimming", devices=[device]) == ["1,7"]


def test_a_process_has_its_limits_user_and_groups(runc: Runc) -> None:
    rlimits = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
    (runc.rootfs / "etc/passwd").write_text("web:x:33:44::/:/bin/sh\n")
    (runc.rootfs / "etc/group").write_text("web:x:44:\nlog:x:7:web\nmail:x:8:\n")
    script = (
        "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj; id -u; id -G; grep NoNew /proc/self/status"
    )
    options = {"rlimits": rlimits, "oom_score_adj": 500, "user": "web", "group_add": ["mail", "9"]}
    lines = runc.sh(script, no_new_privileges=False, **options)
    assert lines[:5] == ["100", "200", "0", "500", "33"]
    assert sorted(map(int, lines[5].split())) == [7, 8, 9, 44]
    assert lines[6].split() == ["NoNewPrivs:", "0"]
    assert status(runc.ok("cat", "/proc/self/status"))["NoNewPrivs"] == "1"


def test_limits_are_set_on_the_cgroup_that_was_named_when_hooks_run(runc: Runc, tmp_path: Path) -> None:
    # With cgroup v1 a controller has a place of its own; v2 has one for all, and other names and units.
    cgroup = f"/{runc.namespace}/deep/one"
    out = tmp_path / "hook"
    files = [
        ("memory", "memory.limit_in_bytes", "memory.max"), ("pids", "pids.max", "pids.max"),
        ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    ]  # fmt: skip
    script = "; ".join(
        f"cat /sys/fs/cgroup/{one}{cgroup}/{v1} 2>/dev/null || cat /sys/fs/cgroup{cgroup}/{v2}" for one, v1, v2 in files
    )
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"{{ cat > /dev/null; {script}; }} > {out} 2>&1"], "timeout": 20}
    after = {"path": "/bin/sh", "args": ["sh", "-c", f"touch {out}.after"]}
    resources = {"memory": 64 << 20, "cpu_quota": 50000, "cpu_period": 100000, "pids_limit": 10}
    options = {"resources": resources, "cgroup": cgroup, "hooks": {"create_runtime": [hook], "poststop": [after]}}
    lines = runc.sh("cat /proc/self/cgroup", **options)
    assert any(line.endswith(cgroup) or line.endswith(":/") for line in lines)
    told = out.read_text().split()
    assert told[:3] == [str(64 << 20), "10", "50000"]
    assert Path(f"{out}.after").exists()


def test_names_and_kernel_parameters_are_the_containers_own(runc: Runc) -> None:
    script = "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward"
    options = {"hostname": "box", "domainname": "example.org", "sysctl": {"net.ipv4.ip_forward": "1"}}
    assert runc.sh(script, **options) == ["box", "example.org", "1"]


def test_the_nodes_namespaces_are_shared_where_asked(runc: Runc) -> None:
    script = "for kind in pid ipc uts; do readlink /proc/self/ns/$kind; done; hostname"
    own = [namespace(f"/proc/self/ns/{kind}") for kind in ("pid", "ipc", "uts")]
    assert not set(own) & set(runc.sh(script))
    assert runc.sh(script, pid_mode="host", ipc_mode="host", uts_mode="host") == [*own, socket.gethostname()]


def test_a_namespace_is_joined_by_its_path(runc: Runc) -> None:
    with subprocess.Popen(["unshare", "--ipc", "sleep", "60"]) as holder:
        try:
            path = f"/proc/{holder.pid}/ns/ipc"
            deadline = time.monotonic() + 10
            while namespace(path) == namespace("/proc/self/ns/ipc"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert runc.ok("readlink", "/proc/self/ns/ipc", ipc_mode=path) == [namespace(path)]
        finally:
            holder.kill()


def test_a_user_namespace_maps_root_to_nobody_of_the_node(runc: Runc, tmp_path: Path) -> None:
    # What root in it is to reach must let that user of the node through, what it is to change must be its own, and
    # where something is mounted must be there: it can't make it.
    for directory in [tmp_path, *tmp_path.parents]:
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(0o711)
    (runc.rootfs / "own").mkdir()
    (runc.rootfs / "run").mkdir()
    os.chown(runc.rootfs / "own", 100000, 100000)
    script = (
        "id -u; awk '{print $2}' /proc/self/uid_map; touch /x 2>/dev/null || echo refused; "
        "touch /own/x; stat -c %u /own"
    )
    lines = runc.sh(script, uid_mappings=MAP, gid_mappings=MAP)
    assert lines == ["0", "100000", "refused", "0"]
    assert (runc.rootfs / "own/x").stat().st_uid == 100000


# --------------------------------------------------------------------------------------------------------- over the bus


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="module")
def reference(registry: Registry) -> str:
    return images.push(images.busybox_image(), registry.host, "spec")


@pytest.fixture
async def node(tmp_path: Path, natsd: NatsServer, reference: str) -> AsyncIterator[RuntimeNode]:
    async with runtime_node(tmp_path, natsd, others=("content", "snapshot")) as started:
        await started.client.operate(content.IMAGE_PULL, content.PullImage(name=reference), timeout=60)
        yield started


async def output_of(node: RuntimeNode, request: api.RunTask) -> list[str]:
    """What a run that is removed at its end has printed."""
    output = node.directory / f"{request.id}.out"
    request = request.model_copy(update={"stdio": Stdio(stdout=f"file://{output}"), "remove": True})
    await node.client.operate(api.TASK_RUN, request, timeout=60)
    assert (await node.wait(request.id)).exit_status == 0
    return output.read_text().splitlines()


async def test_a_run_has_the_options_of_its_message_or_a_whole_specification(node: RuntimeNode, reference: str) -> None:
    script = "grep -E '^(Seccomp|CapEff):' /proc/self/status; hostname"
    request = api.RunTask(id="one", image=reference, args=["sh", "-c", script], cap_drop=["ALL"], hostname="box")
    lines = await output_of(node, request)
    assert [line.split()[-1] for line in lines] == ["0" * 16, "2", "box"]
    spec = node.spec(["sh", "-c", "hostname; id -u; ls /dev/shm 2>/dev/null || echo only what it says"])
    spec["hostname"] = "whole"
    spec["process"]["user"] = {"uid": 7, "gid": 7}
    assert await output_of(node, api.RunTask(id="two", image=reference, spec=spec)) == [
        "whole", "7", "only what it says",
    ]  # fmt: skip


async def test_a_run_that_can_not_be_is_refused_and_leaves_nothing(node: RuntimeNode, reference: str) -> None:
    wrong = node.spec(["true"])
    wrong["linux"]["namespaces"].append({"type": "everything"})
    cases = [
        (
            api.RunTask(id="one", image=reference, spec=wrong),
            r"linux.namespaces\[5\].type: 'everything' must be one of",
        ),
        (api.RunTask(id="one", image=reference, cap_add=["CAP_NONSENSE"]), "CAP_NONSENSE"),
        (api.RunTask(id="one", image=reference, seccomp={"defaultAction": "x"}), "seccomp: defaultAction"),
        (api.RunTask(id="one", image=reference, group_add=["nobody-here"]), "nobody-here"),
    ]
    for request, told in cases:
        with pytest.raises(InvalidArgument, match=told):
            await node.client.operate(api.TASK_RUN, request, timeout=60)
        with pytest.raises(NotFound):
            await node.client.call(api.CONTAINER_GET, api.GetContainer(id="one"))
        assert node.of_containers() == []
