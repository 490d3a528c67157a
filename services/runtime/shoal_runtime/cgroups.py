"""The cgroup of a namespace, parent of its containers' own: a runtime makes it on the way and never removes it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shoal_bus.database import Database

from shoal_runtime.bundles import Bundles

_ROOT = Path("/sys/fs/cgroup")


def remove_empty(database: Database, bundles: Bundles) -> None:
    """Removes the cgroups (and bundle directories) of namespaces in which nothing runs.

    A task's row is there before its runtime is started, so no copy can begin one while the transaction lasts: the
    runtime would lose the directory between making it and making its own in it.
    """
    for namespace in bundles.namespaces():
        with database.write() as tx:
            if tx.execute("SELECT 1 FROM tasks WHERE namespace = ?", (namespace,)).fetchone():
                continue
            for hierarchy in _hierarchies():
                with suppress(OSError):  # it isn't there, or somebody else's are in it
                    (hierarchy / namespace).rmdir()
            bundles.forget(namespace)


def _hierarchies() -> list[Path]:
    """Where cgroups are: one place with cgroup v2, one for each controller with v1."""
    with suppress(OSError):
        return [_ROOT, *(entry for entry in _ROOT.iterdir() if (entry / "cgroup.procs").exists())]
    return []
