"""What a worker does that copies trees and computes layers (`shoal_bus.forkserver`): jobs on lines of JSON, one at a
time.

Each is answered with any number of `{"progress": {…}}`, then with `{"done": {…}}` or `{"error": {…}}`. A layer goes to
the file that the job names, a pipe of the service's; `{"opened": true}` is said when this end of it is open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, BinaryIO

from shoal_snapshot.apply.errors import ApplyError, of_os_error
from shoal_snapshot.copying import copy_tree
from shoal_snapshot.diff import compute

Say = Callable[[dict[str, Any]], None]


def _copy(arguments: dict[str, Any], say: Say) -> dict[str, Any]:
    copy_tree(arguments["source"], arguments["target"])
    return {}


def _compute(arguments: dict[str, Any], say: Say) -> dict[str, Any]:
    output = os.open(arguments["output"], os.O_WRONLY | os.O_CLOEXEC)
    try:
        say({"opened": True})
        return compute.compute(arguments, lambda told: say({"progress": told}), output)
    finally:
        os.close(output)


_WORKS: dict[str, Callable[[dict[str, Any], Say], dict[str, Any]]] = {"copy": _copy, "compute": _compute}


def work(requests: BinaryIO, answers: int) -> None:
    """Jobs until there are no more."""
    os.umask(0)

    def say(message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    for line in requests:
        job = json.loads(line)
        try:
            say({"done": _WORKS[job["what"]](job["arguments"], say)})
        except (ApplyError, OSError, MemoryError) as error:
            told = _told(error, job["what"])
            say({"error": {"code": told.code, "message": told.message, "hint": told.hint}})


def _told(error: BaseException, what: str) -> ApplyError:
    if isinstance(error, OSError):
        return of_os_error(error, os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else what)
    if isinstance(error, MemoryError):
        return ApplyError(f"{what}: out of memory", code="RESOURCE_EXHAUSTED")
    assert isinstance(error, ApplyError)
    return error
