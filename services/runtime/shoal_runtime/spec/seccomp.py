"""The seccomp profile of a container (runtime-spec, config-linux.md#seccomp): the default one, or the client's."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from shoal_bus.errors import FailedPrecondition

from shoal_runtime.spec import machine, syscalls
from shoal_runtime.spec.check import check_seccomp
from shoal_runtime.spec.docker_profile import from_docker, is_dockers

_ARCHITECTURES = {
    "x86_64": ["X86_64", "X86", "X32"],
    "aarch64": ["ARM", "AARCH64"],
    "loongarch64": ["LOONGARCH64"],
    "riscv64": ["RISCV64"],
    "s390x": ["S390", "S390X"],
}
_AF_ALG, _AF_VSOCK = 38, 40
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux's, a 32-bit address space's, UNAME26's, both, and the question which one it is: personality(2)."""
_NEW_NAMESPACES = 0x7E020000
"""clone(2)'s flags that make a namespace."""


def profile_of(
    given: dict[str, Any] | str | None, capabilities: Iterable[str], *, privileged: bool
) -> dict[str, Any] | None:
    """What `linux.seccomp` is to be, or None for no filter.

    None is the default profile, and no filter for a privileged container or on a kernel that has none. INVALID_ARGUMENT
    for a profile that isn't one; FAILED_PRECONDITION for one that the kernel can't have.
    """
    if given == "unconfined" or (given is None and (privileged or not machine.filters_system_calls())):
        return None
    if not machine.filters_system_calls():
        raise FailedPrecondition(
            "seccomp: this node's kernel has no system call filters", hint="use --security-opt seccomp=unconfined"
        )
    if not isinstance(given, dict):
        return default_profile(capabilities)
    profile = from_docker(given, set(capabilities)) if is_dockers(given) else given
    check_seccomp(profile)
    return profile


def default_profile(
    capabilities: Iterable[str], *, processor: str | None = None, kernel: tuple[int, int] | None = None
) -> dict[str, Any]:
    """containerd's default profile, for a process with these capabilities (on this machine, if none is given)."""
    processor, kernel = processor or machine.machine(), kernel or machine.kernel()
    held = set(capabilities)
    allowed = {*syscalls.ALWAYS, *syscalls.BY_MACHINE.get(processor, [])}
    for version, names in syscalls.SINCE_KERNEL.items():
        if kernel >= version:
            allowed.update(names)
    for capability in held:
        allowed.update(syscalls.BY_CAPABILITY.get(capability, []))
    rules = [{"names": sorted(allowed), "action": "SCMP_ACT_ALLOW"}, *_sockets(), *_personalities()]
    if "CAP_SYS_ADMIN" not in held:
        flags = 1 if processor == "s390x" else 0
        rules.append(_allow("clone", flags, "SCMP_CMP_MASKED_EQ", _NEW_NAMESPACES, 0))
        # Its flags lie in memory, where no filter sees them: "not there" makes C libraries fall back to clone.
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS})
    profile: dict[str, Any] = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}
    if processor in _ARCHITECTURES:
        # Each further one costs runc milliseconds with every container: x32 only where the kernel has it.
        profile["architectures"] = [
            f"SCMP_ARCH_{name}" for name in _ARCHITECTURES[processor] if name != "X32" or machine.runs_x32()
        ]
    return profile


def _sockets() -> list[dict[str, Any]]:
    """socket(2) of every family but AF_ALG and AF_VSOCK, as ranges around them.

    Two "not equal" conditions on one argument would become two rules, each of which lets the other's family through.
    """
    return [
        _allow("socket", 0, "SCMP_CMP_LT", _AF_ALG),
        _allow("socket", 0, "SCMP_CMP_EQ", _AF_ALG + 1),
        _allow("socket", 0, "SCMP_CMP_GT", _AF_VSOCK),
    ]


def _personalities() -> list[dict[str, Any]]:
    return [_allow("personality", 0, "SCMP_CMP_EQ", value) for value in _PERSONALITIES]


def _allow(name: str, index: int, operator: str, value: int, second: int | None = None) -> dict[str, Any]:
    condition = {"index": index, "value": value, "op": operator} | ({} if second is None else {"valueTwo": second})
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]}
