"""Platforms: how they are written, which this node runs, and which image of an index is the best for one.

Spelling and compatibility follow containerd's platforms package: `x86_64` is `amd64`, `arm64` implies `v8`, and a
processor of a later variant runs what was built for an earlier one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Platform

_ARCHITECTURES = {
    "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "aarch64": ("arm64", ""), "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"), "i386": ("386", ""), "i686": ("386", ""),
}  # fmt: skip
_DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
"""What a platform without a variant means."""
_AMD64_LEVELS = (  # psABI for x86-64, 3.1.1; the names are /proc/cpuinfo's
    ("v2", {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    ("v3", {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("v4", {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}),
)


def parse(text: str) -> Platform:
    """The platform of `os/architecture[/variant]`, or of an architecture alone (Linux). INVALID_ARGUMENT."""
    parts = text.strip().lower().split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if not 2 <= len(parts) <= 3 or not all(part.replace("_", "").replace("-", "").isalnum() for part in parts):
        raise InvalidArgument(f"platform {text[:80]!r}: can't be read", hint="as linux/amd64 or linux/arm/v7")
    return normalise(Platform(os=parts[0], architecture=parts[1], variant=parts[2] if len(parts) == 3 else ""))


def normalise(platform: Platform) -> Platform:
    """The same platform in its one spelling; a variant that goes without saying is left out."""
    architecture, variant = _ARCHITECTURES.get(platform.architecture.lower(), (platform.architecture.lower(), ""))
    variant = platform.variant.lower() or variant
    if variant[:1].isdigit():
        variant = f"v{variant}"
    if architecture != "arm" and variant == _DEFAULT_VARIANTS.get(architecture):
        variant = ""
    if architecture == "arm" and not variant:
        variant = "v7"
    return Platform(os=platform.os.lower(), architecture=architecture, variant=variant, os_version=platform.os_version)


@cache
def here() -> Platform:
    """This node's own platform."""
    platform = normalise(Platform(os="linux", architecture=os.uname().machine))
    if platform.architecture == "amd64":
        flags = _cpu_flags()
        for level, needed in _AMD64_LEVELS:
            if not needed <= flags:
                break
            platform = platform.model_copy(update={"variant": level})
    return platform


def wanted(text: str) -> list[Platform]:
    """What satisfies a request, the best first: of a platform written out, or (empty) of this node's own."""
    platform = parse(text) if text else here()
    found = _variants(platform)
    if not text and platform.architecture == "arm64" and not platform.variant:
        found += _variants(Platform(os=platform.os, architecture="arm", variant="v8"))
    elif not text and platform.architecture == "amd64":
        found.append(Platform(os=platform.os, architecture="386"))
    return found


def best(wanted: Sequence[Platform], offered: Sequence[Platform | None]) -> int | None:
    """The index of the first of `offered` that satisfies the most wanted platform; None if none satisfies any."""
    spelt = [normalise(one) if one is not None else None for one in offered]
    for platform in wanted:
        for at, one in enumerate(spelt):
            if one is not None and _same(platform, one):
                return at
    return None


def same(platform: Platform, *others: Platform) -> bool:
    """Whether a platform is exactly one of others, which are in their one spelling."""
    return any(_same(normalise(platform), other) for other in others)


def _same(a: Platform, b: Platform) -> bool:
    return (a.os, a.architecture, a.variant) == (b.os, b.architecture, b.variant)


def _variants(platform: Platform) -> list[Platform]:
    """`platform`, then its earlier variants."""
    variant = platform.variant or _DEFAULT_VARIANTS.get(platform.architecture, "")
    if not (variant[1:].isdigit() and variant.startswith("v")):
        return [platform]
    lowest = {"arm": 5, "arm64": 8}.get(platform.architecture, 1)
    return [
        normalise(platform.model_copy(update={"variant": f"v{level}"}))
        for level in range(int(variant[1:]), lowest - 1, -1)
    ] or [platform]


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
