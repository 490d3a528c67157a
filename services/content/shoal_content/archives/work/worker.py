"""The process that works: `python -P -m shoal_content.archives.work.worker <parent's pid>`.

It says `{"ready": …}`, then reads jobs from standard input, one at a time and each on a line of JSON, and answers on
standard output: any number of `{"offset": …, "total": …}`, then `{"done": {…}}` or `{"error": {…}}`. It ends with its
input, and is killed with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from shoal_content.archives.work.errors import WorkError, of_os_error
from shoal_content.archives.work.load import Load, load
from shoal_content.archives.work.recompress import Recompress, recompress
from shoal_content.archives.work.save import Save, save

PR_SET_PDEATHSIG = 1
_PROGRESS_SECONDS = 0.1
_WORK: dict[str, Callable[[dict[str, Any], Callable[[int, int], None]], dict[str, Any]]] = {
    "load": lambda job, report: load(Load(**job), report),
    "save": lambda job, report: save(Save(**job), report),
    "recompress": lambda job, report: recompress(Recompress(**job), report),
}


def main() -> None:
    """Jobs until the input ends."""
    # A signal for the whole group is the service's affair: it ends this process when it has no use for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        return
    # What a library prints must not look like an answer.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    say({"ready": os.getpid()})
    for line in sys.stdin:
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


if __name__ == "__main__":
    main()
