"""What of an OCI specification a shim goes by. The service tells it, so that no shim has to read a specification."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def facts(spec: dict[str, Any]) -> dict[str, Any]:
    """Whether the container has a PID namespace of its own, which hooks it has, and whether it uses Intel's RDT."""
    linux = spec.get("linux") or {}
    namespaces = linux.get("namespaces") or []
    return {
        "own_pids": any(n.get("type") == "pid" and not n.get("path") for n in namespaces),
        "hooks": [name for name, hooks in (spec.get("hooks") or {}).items() if hooks],
        "rdt": bool(linux.get("intelRdt")),
    }
