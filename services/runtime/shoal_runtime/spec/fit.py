"""Fits a specification to what this machine lets us do, as containerd's `restrict_oom_score_adj` does, and more.

Without CAP_SYS_RESOURCE (nested in a container, say), nobody may raise a hard limit or lower an OOM score: a runtime
that is told to fails with EPERM. The nearest allowed value is taken then, and the log says so.
"""

from __future__ import annotations

import copy
import resource
from functools import cache
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_CAP_SYS_RESOURCE = 24


def fit_to_host(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` itself, or a copy of it with limits that can be set here."""
    if not spec.get("process") or _may_raise_limits():
        return spec
    process = copy.deepcopy(spec["process"])
    adjust, own = process.get("oomScoreAdj"), int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    if isinstance(adjust, int) and adjust < own:
        log.warning("spec.restricted", field="process.oomScoreAdj", asked=adjust, given=own)
        process["oomScoreAdj"] = own
    for limit in process.get("rlimits") or []:
        _restrict(limit)
    return {**spec, "process": process}


def _restrict(limit: dict[str, Any]) -> None:
    number = getattr(resource, str(limit.get("type")), None)
    if number is None:
        return
    _, hard = resource.getrlimit(number)
    if hard == resource.RLIM_INFINITY:
        return
    for kind in ("hard", "soft"):
        asked = limit.get(kind)
        if isinstance(asked, int) and asked > hard:
            log.warning("spec.restricted", field=f"process.rlimits.{limit['type']}.{kind}", asked=asked, given=hard)
            limit[kind] = hard


@cache
def _may_raise_limits() -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)
    return False
