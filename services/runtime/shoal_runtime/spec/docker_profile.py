"""Docker's own form of a seccomp profile made into OCI's.

It says for which machines, kernels and capabilities each rule is (`archMap`, `includes`, `excludes`). OCI's form has no
such fields, and a runtime that ignored them would allow what the profile allows some containers to all of them.
"""

from __future__ import annotations

from typing import Any

from shoal_bus.errors import InvalidArgument

from shoal_runtime.spec import machine

_OCI_ARCHITECTURE = {
    "x86_64": "X86_64", "i686": "X86", "aarch64": "AARCH64", "arm": "ARM", "ppc64le": "PPC64LE", "s390x": "S390X",
    "riscv64": "RISCV64", "loongarch64": "LOONGARCH64", "mips64": "MIPS64",
}  # fmt: skip
_GO_ARCHITECTURE = {"x86_64": "amd64", "i686": "x86", "aarch64": "arm64", "loongarch64": "loong64"}
_OWN_FIELDS = ("archMap", "includes", "excludes", "name")


def is_dockers(profile: dict[str, Any]) -> bool:
    """Whether a profile has fields that Docker's form alone has."""
    rules = profile.get("syscalls")
    return "archMap" in profile or any(
        field in rule for rule in (rules if isinstance(rules, list) else ()) if isinstance(rule, dict)
        for field in _OWN_FIELDS
    )  # fmt: skip


def from_docker(profile: dict[str, Any], capabilities: set[str]) -> dict[str, Any]:
    """The OCI profile that it is here, for a process with these capabilities. INVALID_ARGUMENT if it isn't one."""
    made = {key: value for key, value in profile.items() if key not in ("archMap", "syscalls")}
    if profile.get("archMap"):
        if profile.get("architectures"):
            raise InvalidArgument("seccomp: archMap and architectures exclude one another")
        own = f"SCMP_ARCH_{_OCI_ARCHITECTURE.get(machine.machine(), '')}"
        for index, entry in enumerate(_list(profile["archMap"], "archMap")):
            if _map(entry, f"archMap[{index}]").get("architecture") == own:
                made["architectures"] = [own, *(entry.get("subArchitectures") or [])]
    rules = _list(profile.get("syscalls") or [], "syscalls")
    made["syscalls"] = [
        _rule(rule) for index, rule in enumerate(rules) if _applies(rule, f"syscalls[{index}]", capabilities)
    ]
    return made


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in rule.items() if key not in (*_OWN_FIELDS, "comment") and value is not None}
    if rule.get("name"):
        if rule.get("names"):
            raise InvalidArgument("seccomp: a rule has either name or names")
        made["names"] = [rule["name"]]
    return made


def _applies(rule: object, path: str, capabilities: set[str]) -> bool:
    entry = _map(rule, path)
    includes = _map(entry.get("includes") or {}, f"{path}.includes")
    excludes = _map(entry.get("excludes") or {}, f"{path}.excludes")
    wanted = includes.get("arches")
    here = machine.machine()
    name = _GO_ARCHITECTURE.get(here, here)
    return (
        (not wanted or name in _list(wanted, f"{path}.includes.arches"))
        and name not in _list(excludes.get("arches") or [], f"{path}.excludes.arches")
        and capabilities.issuperset(_list(includes.get("caps") or [], f"{path}.includes.caps"))
        and capabilities.isdisjoint(_list(excludes.get("caps") or [], f"{path}.excludes.caps"))
        and (not includes.get("minKernel") or machine.kernel() >= _version(includes["minKernel"], path))
        and (not excludes.get("minKernel") or machine.kernel() < _version(excludes["minKernel"], path))
    )


def _version(value: object, path: str) -> tuple[int, int]:
    major, dot, minor = str(value).partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise InvalidArgument(f"seccomp: {path}: minKernel {value!r} must be two numbers, as 4.8")
    return int(major), int(minor)


def _map(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"seccomp: {path}: must be a map")
    return value


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidArgument(f"seccomp: {path}: must be a list")
    return value
