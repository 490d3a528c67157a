"""The process that does work which takes long: `python -P -m shoal_snapshot.work <parent's pid> <output fd>`.

It reads its work from standard input as JSON, says lines of JSON on standard output (any number with `progress`, then
one with `done` or `error`), and ends. It is killed with its parent. What it imports is light, and knows nothing of the
bus.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from shoal_snapshot.apply.errors import ApplyError, of_os_error
from shoal_snapshot.syscalls import die_with_parent

Say = Callable[[dict[str, Any]], None]


def _copy(arguments: dict[str, Any], say: Say, output: int) -> dict[str, Any]:
    from shoal_snapshot import copying

    copying.copy_tree(arguments["source"], arguments["target"])
    return {}


def _compute(arguments: dict[str, Any], say: Say, output: int) -> dict[str, Any]:
    from shoal_snapshot.diff import compute

    return compute.compute(arguments, say, output)


_WORKS: dict[str, Callable[[dict[str, Any], Say, int], dict[str, Any]]] = {"copy": _copy, "compute": _compute}


def main() -> None:
    """One piece of work."""
    # A signal for the whole group is the service's affair: it ends this process when it has no use for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(int(sys.argv[1]))
    os.umask(0)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    work = json.load(sys.stdin.buffer)
    try:
        done = _WORKS[work["what"]](work["arguments"], lambda progress: say({"progress": progress}), int(sys.argv[2]))
    except (ApplyError, OSError, MemoryError) as error:
        told = _told(error, work["what"])
        say({"error": {"code": told.code, "message": told.message, "hint": told.hint}})
    else:
        say({"done": done})


def _told(error: BaseException, what: str) -> ApplyError:
    if isinstance(error, OSError):
        return of_os_error(error, os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else what)
    if isinstance(error, MemoryError):
        return ApplyError(f"{what}: out of memory", code="RESOURCE_EXHAUSTED")
    assert isinstance(error, ApplyError)
    return error


if __name__ == "__main__":
    main()
