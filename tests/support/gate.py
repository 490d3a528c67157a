"""An OCI runtime that stops where a test wants it to, in the middle of its work, to be killed there.

gate = Gate(directory, "runc")
gate.close("before create")         # or "after create", or the name of a hook that `hook` made
…                                   # have it create a container whose runtime is `gate.path`
held = await gate.arrived(node)     # it stands still now
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

from tests.support import process_table
from tests.support.process_table import Entry

VERBS = "create|start|exec|delete|pause|resume"
RUNTIMES = {
    "runc": "runc",
    # crun refuses a hybrid machine whose cgroup v2 has a controller; where it isn't mounted, there is v1 alone.
    "crun": """unshare -m sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"' crun""",
}
_SECONDS = 30.0

_SCRIPT = """#!/bin/sh
stop() {{ mv "{place}/$1" "{place}/held" 2>/dev/null && kill -STOP $$; }}
for word; do case $word in {verbs}) verb=$word; break;; esac; done
stop "before $verb"
[ -e "{place}/after $verb" ] || exec {runtime} "$@"
{runtime} "$@"
status=$?
stop "after $verb"
exit $status
"""


class Gate:
    """A runtime with a gate before and after each of its verbs; every gate that is closed stops whoever comes first."""

    def __init__(self, place: Path, runtime: str) -> None:
        self._place = place / f"gate-{secrets.token_hex(4)}"
        self._place.mkdir()
        self.path = str(self._place / "runtime")
        Path(self.path).write_text(_SCRIPT.format(place=self._place, verbs=VERBS, runtime=RUNTIMES[runtime]))
        Path(self.path).chmod(0o755)

    def hook(self, name: str) -> dict[str, Any]:
        """An OCI hook with a gate in it (runtime-spec, config.md, "POSIX-platform Hooks")."""
        script = f'mv "{self._place}/{name}" "{self._place}/held" 2>/dev/null && kill -STOP $$; exit 0'
        return {"path": "/bin/sh", "args": ["sh", "-c", script]}

    def close(self, where: str) -> None:
        (self._place / where).touch()

    async def arrived(self) -> Entry:
        """Who stands still at the gate that was closed."""
        async with asyncio.timeout(_SECONDS):
            while not (self._place / "held").exists() or not (stopped := stopped_below()):
                await asyncio.sleep(0.005)
        (self._place / "held").unlink()
        (held,) = stopped
        return held


def stopped_below() -> list[Entry]:
    """The processes below this one that somebody has stopped."""
    return [entry for entry in process_table.below(os.getpid()) if entry.state == "T"]


def shim_above(entry: Entry) -> tuple[Entry, Entry]:
    """The shim that a process works for, and which of its, or its worker's, children that is, or belongs to."""
    while (parent := process_table.look(entry.parent)) is not None:
        if parent.name == "shoal-shim":
            return parent, entry
        if parent.name == "shoal-worker":
            shim = process_table.look(parent.parent)
            assert shim is not None
            return shim, entry
        entry = parent
    raise AssertionError(f"{entry} works for no shim")
