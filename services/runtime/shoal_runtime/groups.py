"""Groups of containers: those of one sandbox share a shim."""

from __future__ import annotations

from typing import Any

_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
"""Those of an OCI specification that name a container's group: containerd's."""


def group_of(spec: dict[str, Any]) -> str:
    """The group a container belongs to by its specification; empty for one by itself."""
    annotations = spec.get("annotations") or {}
    return str(next((annotations[name] for name in _ANNOTATIONS if annotations.get(name)), ""))
