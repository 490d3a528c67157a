"""What a run asks for becomes what OCI calls it; what can't be is refused, and the field is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from shoal_bus.api.runtime import RunTask, SpecOptions
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_runtime.spec import check_spec, generate_spec
from shoal_runtime.spec.capabilities import NAMES, capabilities_of, held_here
from shoal_runtime.spec.defaults import CAPABILITIES

MAP = [{"container_id": 0, "host_id": 100000, "size": 65536}]


def spec_of(**options: Any) -> dict[str, Any]:
    image = {"config": {"Cmd": ["true"]}}
    spec = generate_spec("team", "web-1", image, [], SpecOptions.model_validate(options))
    check_spec(spec)
    return spec


def mount_at(spec: dict[str, Any], destination: str) -> dict[str, Any]:
    (found,) = (mount for mount in spec["mounts"] if mount["destination"] == destination)
    return found  # type: ignore[no-any-return]


def test_a_mount_is_added_or_takes_a_defaults_place(tmp_path: Path) -> None:
    shm = {"destination": "/dev/shm/", "type": "tmpfs", "source": "shm", "options": ["size=2m"]}
    spec = spec_of(
        mounts=[
            {"destination": "/data", "source": str(tmp_path), "options": ["ro"]},
            {"destination": "/scratch", "type": "tmpfs", "options": ["size=1m"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=700"]},
            shm,
        ]
    )
    assert mount_at(spec, "/data") == {
        "destination": "/data", "type": "bind", "source": str(tmp_path), "options": ["rbind", "ro"],
    }  # fmt: skip
    assert mount_at(spec, "/scratch")["source"] == "tmpfs"
    assert mount_at(spec, "/dev/shm")["options"] == ["size=2m"]
    order = [mount["destination"] for mount in spec["mounts"]]
    assert order.index("/dev") < order.index("/dev/pts") < order.index("/scratch")
    assert order[-2:] == ["/data", "/scratch"]


def test_a_bind_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="is not there on this node"):
        spec_of(mounts=[{"destination": "/data", "source": str(tmp_path / "none")}])


def test_devices_are_nodes_with_rules() -> None:
    spec = spec_of(devices=[{"path": "/dev/zero", "container_path": "/dev/nought", "permissions": "r"}])
    (device,) = spec["linux"]["devices"]
    assert (device["path"], device["type"], device["major"], device["minor"]) == ("/dev/nought", "c", 1, 5)
    rule = {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "r"}
    assert spec["linux"]["resources"]["devices"][-1] == rule
    assert spec["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    for path in ("/dev/no-such-device", "/etc/hostname", "/etc"):
        with pytest.raises(FailedPrecondition, match=f"device {path}"):
            spec_of(devices=[{"path": path}])


def test_capabilities_are_added_and_dropped_as_docker_does() -> None:
    def of(**options: Any) -> set[str]:
        return set(capabilities_of(SpecOptions.model_validate(options)))

    assert of() == set(CAPABILITIES)
    assert of(cap_add=["net_admin"]) == {*CAPABILITIES, "CAP_NET_ADMIN"}
    assert of(cap_drop=["CAP_MKNOD"]) == set(CAPABILITIES) - {"CAP_MKNOD"}
    assert of(cap_drop=["ALL"]) == set()
    assert of(cap_drop=["all"], cap_add=["chown"]) == {"CAP_CHOWN"}
    assert of(cap_add=["ALL"], cap_drop=["MKNOD"]) == set(held_here()) - {"CAP_MKNOD"}
    assert of(privileged=True) == set(held_here())
    with pytest.raises(InvalidArgument, match="CAP_NONSENSE"):
        of(cap_add=["NONSENSE"])
    missing = [name for name in NAMES if name not in held_here()]
    for name in missing[:1]:
        with pytest.raises(FailedPrecondition, match=name):
            of(cap_add=[name])
        assert name in of(cap_add=[name], uid_mappings=MAP, gid_mappings=MAP)


def test_a_privileged_container_is_kept_from_nothing() -> None:
    spec = spec_of(privileged=True)
    linux = spec["linux"]
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == ([], [])
    assert "seccomp" not in linux
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert {"/dev/null", "/dev/zero"} <= {device["path"] for device in linux["devices"]}
    assert not [device for device in linux["devices"] if device["path"].startswith(("/dev/pts", "/dev/console"))]
    assert "rw" in mount_at(spec, "/sys")["options"]
    assert spec["process"]["noNewPrivileges"] is True
    assert "seccomp" in spec_of(privileged=True, seccomp="default")["linux"]


def test_limits_are_those_of_oci() -> None:
    resources = spec_of(
        resources={
            "memory": 1 << 20, "memory_swap": 2 << 20, "memory_reservation": 1 << 19, "cpu_quota": 50000,
            "cpu_period": 100000, "cpu_shares": 512, "cpuset_cpus": "0-1", "cpuset_mems": "0", "pids_limit": 10,
            "blkio_weight": 300,
        }
    )["linux"]["resources"]  # fmt: skip
    assert resources["memory"] == {"limit": 1 << 20, "swap": 2 << 20, "reservation": 1 << 19}
    assert resources["cpu"] == {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0"}
    assert (resources["pids"], resources["blockIO"]) == ({"limit": 10}, {"weight": 300})
    assert list(spec_of()["linux"]["resources"]) == ["devices"]


def test_rlimits_take_a_defaults_place() -> None:
    rlimits = [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]
    assert spec_of(rlimits=rlimits)["process"]["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]  # fmt: skip


def test_the_nodes_namespaces_are_shared_or_joined() -> None:
    def kinds(**options: Any) -> dict[str, str]:
        return {n["type"]: n.get("path", "") for n in spec_of(**options)["linux"]["namespaces"]}

    assert {"pid", "ipc", "uts", "mount", "network"} <= set(kinds())
    assert {"pid", "ipc", "uts"}.isdisjoint(kinds(pid_mode="host", ipc_mode="host", uts_mode="host"))
    assert kinds(pid_mode="/proc/1/ns/pid")["pid"] == "/proc/1/ns/pid"
    assert "hostname" not in spec_of(uts_mode="host")
    assert mount_at(spec_of(ipc_mode="host"), "/dev/shm")["source"] == "/dev/shm"


def test_a_user_namespace_has_maps_and_no_group_that_is_not_mapped() -> None:
    spec = spec_of(uid_mappings=MAP, gid_mappings=MAP)
    assert {"type": "user"} in spec["linux"]["namespaces"]
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}]
    assert "gid=5" in mount_at(spec, "/dev/pts")["options"]
    few = [{"container_id": 0, "host_id": 100000, "size": 1}]
    assert "gid=5" not in mount_at(spec_of(uid_mappings=few, gid_mappings=few), "/dev/pts")["options"]


def test_the_rest_of_a_specification() -> None:
    spec = spec_of(
        hostname="box", domainname="example.org", annotations={"a": "b"}, oom_score_adj=500, no_new_privileges=False,
        cgroup_parent="/team/", sysctl={"net.ipv4.ip_forward": "1"}, rootfs_propagation="shared", read_only=True,
        masked_paths=["/proc/keys"], readonly_paths=[],
        hooks={"create_runtime": [{"path": "/bin/true", "args": ["true", "x"], "timeout": 3}]},
    )  # fmt: skip
    linux = spec["linux"]
    assert (spec["hostname"], spec["annotations"]) == ("box", {"a": "b"})
    assert linux["sysctl"] == {"kernel.domainname": "example.org", "net.ipv4.ip_forward": "1"}
    assert (spec["process"]["oomScoreAdj"], spec["process"]["noNewPrivileges"]) == (500, False)
    assert (linux["cgroupsPath"], linux["rootfsPropagation"]) == ("/team/web-1", "shared")
    assert (linux["maskedPaths"], linux["readonlyPaths"], spec["root"]["readonly"]) == (["/proc/keys"], [], True)
    assert spec["hooks"] == {"createRuntime": [{"path": "/bin/true", "args": ["true", "x"], "timeout": 3}]}
    assert spec_of(cgroup="system.slice:shoal:x")["linux"]["cgroupsPath"] == "system.slice:shoal:x"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mounts": [{"destination": "data", "source": "/"}]}, "mounts.0.destination"),
        ({"mounts": [{"destination": "/", "source": "/"}]}, "mounts.0.destination"),
        ({"mounts": [{"destination": "/a/../..", "source": "/"}]}, "mounts.0.destination"),
        ({"mounts": [{"destination": "/a", "source": "b"}]}, "source of a bind"),
        ({"mounts": [{"destination": "/a", "typo": "b"}]}, "mounts.0.typo"),
        ({"mounts": [{"destination": "/a", "source": "/"}, {"destination": "/a/", "source": "/"}]}, "given twice"),
        ({"devices": [{"path": "/dev/null", "permissions": "x"}]}, "devices.0.permissions"),
        ({"devices": [{"path": "null"}]}, "devices.0.path"),
        ({"cap_add": ["a b"]}, "cap_add.0"),
        ({"rlimits": [{"type": "NOFILE", "soft": 1, "hard": 1}]}, "rlimits.0.type"),
        ({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]}, "above hard"),
        ({"resources": {"memory": -1}}, "resources.memory"),
        ({"resources": {"memory_swap": 5}}, "memory_swap needs memory"),
        ({"resources": {"memory": 5, "memory_swap": 4}}, "counts memory too"),
        ({"resources": {"cpu_quota": 10}}, "cpu_quota"),
        ({"resources": {"cpuset_cpus": "one"}}, "resources.cpuset_cpus"),
        ({"resources": {"blkio_weight": 5}}, "blkio_weight"),
        ({"oom_score_adj": 1001}, "oom_score_adj"),
        ({"seccomp": "none"}, "seccomp"),
        ({"pid_mode": "container"}, "pid_mode"),
        ({"uts_mode": "host", "hostname": "x"}, "uts_mode private"),
        ({"cgroup": "/a", "cgroup_parent": "/b"}, "exclude one another"),
        ({"cgroup": "../a"}, "cgroup"),
        ({"sysctl": {"a b": "1"}}, "sysctl"),
        ({"hooks": {"prestart": [{"path": "true"}]}}, "hooks.prestart.0.path"),
        ({"args": ["a\0b"]}, "args.0"),
        ({"env": ["=x"]}, "env.0"),
        ({"uid_mappings": MAP}, "go together"),
        ({"uid_mappings": MAP, "gid_mappings": [{"container_id": 1, "host_id": 1, "size": 1}]}, "id 0 must be mapped"),
        ({"uid_mappings": MAP, "gid_mappings": MAP * 2}, "ranges overlap"),
        ({"uid_mappings": MAP, "gid_mappings": MAP, "privileged": True}, "user namespace"),
        ({"uid_mappings": MAP, "gid_mappings": MAP, "network": {"mode": "host"}}, "network none"),
        ({"spec": {}, "args": ["x"], "pid_mode": "host"}, "args, pid_mode can't go with it"),
        ({"spec": {}, "network": {"mode": "host"}}, "network can't go with it"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_and_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        RunTask.of({"id": "one", "image": "busybox", **given})
    assert told in str(refused.value)


def test_a_whole_specification_goes_alone_also_behind_the_wire() -> None:
    request = RunTask(id="one", image="busybox", spec={"ociVersion": "1.0.2"}, labels={"a": "b"}, remove=True)
    assert RunTask.unpack(request.pack()) == request


def test_further_options_are_those_of_the_request_alone() -> None:
    with pytest.raises(ValidationError):
        RunTask.model_validate({"id": "one", "image": "busybox", "cap_ad": ["x"]})
