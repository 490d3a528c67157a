"""What a worker does (`shoal_bus.forkserver`): jobs on lines of JSON, one at a time.

Each is answered with any number of `{"offset": …, "total": …}`, then `{"done": {…}}` or `{"error": {…}}`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from os import fdopen
from typing import Any, BinaryIO

from shoal_content.archives.work.errors import WorkError, of_os_error
from shoal_content.archives.work.load import Load, load
from shoal_content.archives.work.recompress import Recompress, recompress
from shoal_content.archives.work.save import Save, save

_PROGRESS_SECONDS = 0.1
_WORK: dict[str, Callable[[dict[str, Any], Callable[[int, int], None]], dict[str, Any]]] = {
    "load": lambda job, report: load(Load(**job), report),
    "save": lambda job, report: save(Save(**job), report),
    "recompress": lambda job, report: recompress(Recompress(**job), report),
}


def work(requests: BinaryIO, answers: int) -> None:
    """Jobs until there are no more."""
    output = fdopen(answers, "w", closefd=False)

    def say(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    for line in requests:
        told = 0.0

        def report(offset: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                say({"offset": offset, "total": total})

        job = json.loads(line)
        try:
            say({"done": _WORK[job["kind"]](job["job"], report)})
        except (WorkError, OSError, MemoryError) as error:
            failed = _told(error, job["what"])
            say({"error": {"code": failed.code, "message": failed.message, "hint": failed.hint}})


def _told(error: BaseException, what: str) -> WorkError:
    if isinstance(error, OSError):
        return of_os_error(error, what)
    if isinstance(error, MemoryError):
        return WorkError(f"{what}: out of memory", code="RESOURCE_EXHAUSTED")
    assert isinstance(error, WorkError)
    return error
