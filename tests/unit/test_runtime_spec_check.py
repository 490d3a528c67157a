"""A client's specification is held against OCI's schema: what is wrong is named by its path, what is new ignored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from shoal_bus.api.runtime import SpecOptions
from shoal_bus.errors import InvalidArgument
from shoal_runtime.spec import check_process, check_resources, check_run_spec, check_spec, generate_spec

_ID_MAP = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def good() -> dict[str, Any]:
    return generate_spec("team", "web-1", {"config": {"Cmd": ["true"]}}, [], SpecOptions())


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good specification with `value` at the dotted `path`."""
    spec = copy.deepcopy(good())
    *steps, last = path.split(".")
    place: Any = spec
    for step in steps:
        place = place[int(step)] if step.isdecimal() else place.setdefault(step, {})
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("ociVersion", None, "ociVersion: is missing"),
        ("ociVersion", "1", "ociVersion: '1' must be a version"),
        ("process", None, "process: is missing"),
        ("process", [], "process: must be a map"),
        ("root", {}, "root.path: is missing"),
        ("root.path", "", "root.path: must be a text that isn't empty"),
        ("root.readonly", "yes", "root.readonly: must be true or false"),
        ("process.args", None, "process.args: is missing"),
        ("process.args", [], "process.args: must begin with the command"),
        ("process.args", ["a", 1], "process.args[1]: must be a text"),
        ("process.args", ["a\0b"], "process.args[0]: must not hold a NUL"),
        ("process.cwd", "x", "process.cwd: must be an absolute path"),
        ("process.env", "A=1", "process.env: must be a list"),
        ("process.user.uid", -1, "process.user.uid: must be from 0 to 4294967295, and is -1"),
        ("process.user.uid", True, "process.user.uid: must be a whole number"),
        ("process.user.additionalGids", [0, "x"], "process.user.additionalGids[1]"),
        ("process.capabilities.bounding", ["NET_ADMIN"], "process.capabilities.bounding[0]: 'NET_ADMIN' must be"),
        ("process.rlimits", [{"type": "RLIMIT_NOFILE", "soft": 1}], "process.rlimits[0].hard: is missing"),
        ("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}], "process.rlimits[0].type: 'RLIMIT_X'"),
        ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}], "process.rlimits[0]: soft 2 is above"),
        ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2, "process.rlimits[1]: RLIMIT_CPU is"),
        ("process.oomScoreAdj", 2000, "process.oomScoreAdj"),
        ("process.consoleSize", {"height": 1}, "process.consoleSize.width: is missing"),
        ("process.ioPriority", {"class": "BEST"}, "process.ioPriority.class"),
        ("process.scheduler", {"policy": "SCHED_X"}, "process.scheduler.policy"),
        ("hostname", 1, "hostname: must be a text"),
        ("mounts", [{}], "mounts[0].destination: is missing"),
        ("mounts", [{"destination": "/a", "options": "ro"}], "mounts[0].options: must be a list"),
        ("mounts", [{"destination": "/a", "uidMappings": [{}]}], "mounts[0].uidMappings[0].containerID: is missing"),
        ("hooks.prestart", [{}], "hooks.prestart[0].path: is missing"),
        ("hooks.poststop", [{"path": "x"}], "hooks.poststop[0].path: must be an absolute path"),
        ("hooks.poststart", [{"path": "/x", "timeout": 0}], "hooks.poststart[0].timeout"),
        ("annotations", {"a": 1}, "annotations.a: must be a text"),
        ("linux", [], "linux: must be a map"),
        ("linux.namespaces.0", {"type": "pids"}, "linux.namespaces[0].type: 'pids' must be one of mount, pid"),
        ("linux.namespaces.0", {"type": "network"}, "network is there twice"),
        ("linux.namespaces.0", {"type": "pid", "path": "x"}, "linux.namespaces[0].path"),
        ("linux.namespaces", [{"type": "mount"}], "hostname: needs a uts namespace"),
        ("linux.uidMappings", _ID_MAP, "linux.uidMappings: needs a user namespace"),
        ("linux.uidMappings", [{"containerID": 0, "hostID": 0, "size": 0}], "linux.uidMappings[0].size"),
        ("linux.devices", [{"path": "/dev/x", "type": "x"}], "linux.devices[0].type: 'x' must be one of c, b, u, p"),
        ("linux.devices", [{"path": "x", "type": "c"}], "linux.devices[0].path: must be an absolute path"),
        ("linux.devices", [{"path": "/dev/x", "type": "c", "major": 1}], "linux.devices[0]: needs major and minor"),
        ("linux.resources.memory", {"limit": -2}, "linux.resources.memory.limit"),
        ("linux.resources.memory", {"swappiness": 300}, "linux.resources.memory.swappiness"),
        ("linux.resources.cpu", {"shares": -1}, "linux.resources.cpu.shares"),
        ("linux.resources.cpu", {"cpus": "a"}, "linux.resources.cpu.cpus"),
        ("linux.resources.pids", {}, "linux.resources.pids.limit: is missing"),
        ("linux.resources.blockIO", {"weight": 2000}, "linux.resources.blockIO.weight"),
        ("linux.resources.blockIO", {"throttleReadBpsDevice": [{"major": 1}]}, "throttleReadBpsDevice[0].minor"),
        ("linux.resources.devices", [{"access": "r"}], "linux.resources.devices[0].allow: is missing"),
        ("linux.resources.hugepageLimits", [{"pageSize": "2 MB", "limit": 1}], "hugepageLimits[0].pageSize"),
        ("linux.resources.network", {"priorities": [{"name": "x"}]}, "priorities[0].priority: is missing"),
        ("linux.rootfsPropagation", "both", "linux.rootfsPropagation"),
        ("linux.seccomp", {}, "linux.seccomp.defaultAction: is missing"),
        ("linux.seccomp.defaultAction", "ALLOW", "linux.seccomp.defaultAction: 'ALLOW' must be one of"),
        ("linux.seccomp.syscalls.0.names", [], "linux.seccomp.syscalls[0].names: must hold 1 or more"),
        ("linux.seccomp.syscalls.1.args.0.op", "EQ", "linux.seccomp.syscalls[1].args[0].op"),
        ("linux.seccomp.syscalls.1.args.0.index", 6, "linux.seccomp.syscalls[1].args[0].index"),
        ("linux.sysctl", {"a": 1}, "linux.sysctl.a: must be a text"),
        ("linux.maskedPaths", [1], "linux.maskedPaths[0]"),
        ("linux.personality", {"domain": "BSD"}, "linux.personality.domain"),
        ("linux.timeOffsets", {"boottime": {"secs": 1.5}}, "linux.timeOffsets.boottime.secs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path: str, value: Any, told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_spec(changed(path, value))
    assert str(refused.value).startswith("spec: ")
    assert told in str(refused.value)


def test_user_namespaces_have_maps_that_do_not_overlap() -> None:
    spec = good()
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"] |= {"uidMappings": _ID_MAP, "gidMappings": _ID_MAP}
    check_spec(spec)
    spec["linux"]["gidMappings"] = [*_ID_MAP, {"containerID": 65535, "hostID": 0, "size": 1}]
    with pytest.raises(InvalidArgument, match=r"linux.gidMappings: ranges of containerID overlap"):
        check_spec(spec)


def test_what_is_unknown_or_null_is_ignored() -> None:
    spec = changed("linux.newThing", {"a": [1]})
    spec |= {"hooks": None, "mounts": None, "vm": {"x": 1}, "windows": None}
    spec["process"] |= {"env": None, "capabilities": None}
    spec["linux"] |= {"seccomp": None, "devices": None}
    check_spec(spec)


def test_a_runs_own_specification_has_its_rootfs_and_terminal() -> None:
    check_run_spec(good(), terminal=False)
    with pytest.raises(InvalidArgument, match=r"root.path: must be rootfs"):
        check_run_spec(changed("root.path", "/"), terminal=False)
    with pytest.raises(InvalidArgument, match=r"process.terminal: must be true"):
        check_run_spec(good(), terminal=True)


def test_updated_resources_are_held_against_the_same() -> None:
    check_resources({"memory": {"limit": 1}, "cpu": {"quota": -1}})
    with pytest.raises(InvalidArgument, match=r"resources: cpu.period: must be a whole number"):
        check_resources({"cpu": {"period": "1"}})
    with pytest.raises(InvalidArgument, match="resources: must name a limit"):
        check_resources({})


def test_the_process_of_an_exec_is_held_against_the_same() -> None:
    check_process({"args": ["true"], "cwd": "/"})
    with pytest.raises(InvalidArgument, match=r"process: cwd: must be an absolute path"):
        check_process({"args": ["true"], "cwd": "x"})
    with pytest.raises(InvalidArgument, match=r"process: args: must begin with the command"):
        check_process({"args": [""], "cwd": "/"})
