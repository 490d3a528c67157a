"""What of an OCI specification a shim goes by. The service tells it, so that no shim has to read a specification."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def facts(spec: dict[str, Any]) -> dict[str, Any]:
    """Whose PID namespace the container is in (the host's, its own, or another's), and what hooks it has."""
    linux = spec.get("linux") or {}
    namespaces = linux.get("namespaces") or []
    return {
        "host_pids": not any(n.get("type") == "pid" for n in namespaces),
        "own_pids": any(n.get("type") == "pid" and not n.get("path") for n in namespaces),
        "hooks": [name for name, hooks in (spec.get("hooks") or {}).items() if hooks],
    }
