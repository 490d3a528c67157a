"""The default seccomp profile is containerd's; a client's own is OCI's, or Docker's made into OCI's."""

from __future__ import annotations

from typing import Any

import pytest
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_runtime.spec import machine
from shoal_runtime.spec.defaults import CAPABILITIES
from shoal_runtime.spec.seccomp import default_profile, profile_of

DOCKERS: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
    ],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "x", "includes": {}, "excludes": {}},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390x"]}},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.1"}},
        {"name": "write", "action": "SCMP_ACT_ALLOW"},
    ],
}  # fmt: skip


@pytest.fixture
def amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is the same wherever the test runs."""
    monkeypatch.setattr(machine, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "kernel", lambda: (6, 1))


def allowed(profile: dict[str, Any]) -> set[str]:
    """What may be called whatever the arguments."""
    rules = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")]
    return {name for rule in rules for name in rule["names"]}


def test_the_default_profile_allows_what_programs_use() -> None:
    profile = default_profile(CAPABILITIES, processor="x86_64", kernel=(6, 1))
    names = allowed(profile)
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {"read", "execve", "futex", "chroot", "ptrace", "arch_prctl", "io_getevents"} <= names
    refused = {"mount", "unshare", "setns", "keyctl", "add_key", "bpf", "reboot", "kexec_load", "userfaultfd", "clone"}
    assert refused.isdisjoint(names | {"io_uring_setup"})
    assert "io_uring_setup" not in names
    clone3 = next(rule for rule in profile["syscalls"] if rule["names"] == ["clone3"])
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    clone = next(rule for rule in profile["syscalls"] if rule["names"] == ["clone"])
    assert clone["args"] == [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    assert {"SCMP_ARCH_X86_64", "SCMP_ARCH_X86"} <= set(profile["architectures"])


def test_the_default_profile_goes_by_capabilities() -> None:
    administrator = default_profile([*CAPABILITIES, "CAP_SYS_ADMIN"], processor="x86_64", kernel=(6, 1))
    assert {"mount", "unshare", "clone", "clone3", "setns"} <= allowed(administrator)
    assert not [rule for rule in administrator["syscalls"] if rule["names"] in (["clone"], ["clone3"])]
    assert "chroot" not in allowed(default_profile([]))
    for capability, name in (("CAP_SYS_MODULE", "init_module"), ("CAP_SYS_TIME", "settimeofday"), ("CAP_BPF", "bpf")):
        assert name in allowed(default_profile([capability]))


def test_the_default_profile_goes_by_kernel_and_machine() -> None:
    assert "ptrace" not in allowed(default_profile([], processor="x86_64", kernel=(4, 4)))
    assert "ptrace" in allowed(default_profile(["CAP_SYS_PTRACE"], processor="x86_64", kernel=(4, 4)))
    arm = default_profile([], processor="aarch64", kernel=(6, 1))
    assert arm["architectures"] == ["SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"]
    assert "cacheflush" in allowed(arm)
    assert "arch_prctl" not in allowed(arm)
    assert "architectures" not in default_profile([], processor="ppc64le", kernel=(6, 1))
    mainframe = default_profile([], processor="s390x", kernel=(6, 1))
    assert next(r for r in mainframe["syscalls"] if r["names"] == ["clone"])["args"][0]["index"] == 1


def test_a_profile_is_the_default_one_none_or_the_clients() -> None:
    own = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}
    assert profile_of(own, [], privileged=False) == own
    assert profile_of(own, [], privileged=True) == own
    assert profile_of("unconfined", [], privileged=False) is None
    assert profile_of(None, [], privileged=True) is None
    assert profile_of(None, CAPABILITIES, privileged=False) == default_profile(CAPABILITIES)
    assert profile_of("default", CAPABILITIES, privileged=True) == default_profile(CAPABILITIES)
    with pytest.raises(InvalidArgument, match="seccomp: defaultAction: is missing"):
        profile_of({}, [], privileged=False)


def test_a_kernel_without_filters_has_no_default_and_takes_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "filters_system_calls", lambda: False)
    assert profile_of(None, [], privileged=False) is None
    for given in ("default", {"defaultAction": "SCMP_ACT_ALLOW"}):
        with pytest.raises(FailedPrecondition, match="no system call filters"):
            profile_of(given, [], privileged=False)


@pytest.mark.usefixtures("amd64")
def test_dockers_profile_is_made_for_this_machine_and_these_capabilities() -> None:
    profile = profile_of(DOCKERS, ["CAP_CHOWN"], privileged=False)
    assert profile is not None
    assert profile["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert allowed(profile) == {"read", "clone", "arch_prctl", "ptrace", "write"}
    assert all(set(rule) <= {"names", "action", "args"} for rule in profile["syscalls"])
    administrator = profile_of(DOCKERS, ["CAP_SYS_ADMIN"], privileged=False)
    assert administrator is not None
    assert allowed(administrator) == {"read", "mount", "arch_prctl", "ptrace", "write"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["SCMP_ARCH_X86"]}, "exclude one another"),
        ({"archMap": {}, "syscalls": {"a": 1}}, "syscalls: must be a list"),
        ({"syscalls": [{"names": ["a"], "name": "b", "action": "SCMP_ACT_ALLOW"}]}, "either name or names"),
        ({"syscalls": [{"names": ["a"], "action": "x", "includes": {"minKernel": "new"}}]}, "minKernel 'new'"),
        ({"syscalls": [{"names": ["a"], "action": "x", "includes": {"caps": "all"}}]}, "includes.caps: must be a list"),
        ({"syscalls": [{"names": ["a"], "action": "x"}]}, "syscalls[0].action: 'x' must be one of"),
    ],
)
@pytest.mark.usefixtures("amd64")
def test_a_profile_that_is_none_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        profile_of(DOCKERS | change, [], privileged=False)
    assert told in str(refused.value)
