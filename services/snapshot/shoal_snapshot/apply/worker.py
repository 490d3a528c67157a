"""What a worker that extracts layers does (`shoal_bus.forkserver`): jobs on lines of JSON, one at a time.

Each is answered with any number of `{"offset": …}` while it reads, and once `{"starved": true}` when that goes no
further than whoever writes the blob; then `{"done": {…}}`, `{"error": {…}}`, or `{"again": …}` where it has to be begun
anew.

A job holds a lock on the directory it writes to, so that who takes over from a killed service can't begin
before this worker is dead, too.
"""

from __future__ import annotations

import json
import os
import threading
from base64 import b64decode
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from shoal_bus.archive.tar import TarReader

from shoal_snapshot import disk
from shoal_snapshot.apply.decompress import Program
from shoal_snapshot.apply.errors import ApplyError, NeedsParent, StartedOver, Starved, of_os_error
from shoal_snapshot.apply.extract import extract
from shoal_snapshot.apply.stream import Blob, LayerStream

STARVED_SECONDS = 0.5
_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One layer and where it goes. Digests, sizes and media type are the blob's descriptor's."""

    base: str
    """The directory that the blob's `path` is relative to, and doesn't leave."""
    path: str
    media_type: str
    digest: str
    size: int
    root: str
    lowers: list[str] = field(default_factory=list)
    """The layers below, the highest first."""
    programs: list[dict[str, Any]] = field(default_factory=list)
    """What it goes through before it is of `media_type`: `command`, `environment`, and `payload` in base64."""
    memory: str = ""
    """A directory that whoever needs much memory locks meanwhile, so that only one does."""
    detached: bool = False
    """There are layers below, but nobody knows them yet."""
    diff_id: str = ""
    growing: bool = False
    """The blob is still being written, and verified by whoever writes it."""
    whole: bool = False
    """What lies below is in `root` already: what the layer takes away is removed there."""
    over: bool = False
    """Another layer is in `root` already, on those below: it is taken away from that, and hidden of these."""

    @property
    def blob(self) -> Blob:
        """The blob."""
        programs = tuple(
            Program(one["command"], one["environment"], b64decode(one["payload"]) if "payload" in one else None)
            for one in self.programs
        )
        return Blob(self.base, self.path, self.media_type, self.digest, self.size, self.growing, programs)


@dataclass(frozen=True)
class Done:
    """What was written; the uncompressed layer's digest and size."""

    diff_id: str
    uncompressed: int
    entries: int
    identity: tuple[int, int] = (0, 0)
    """Which file was read."""
    implied: dict[str, bool] = field(default_factory=dict)
    """Of a detached extraction: what `directories.attach` needs."""


class _Output:
    """Lines of JSON to the service, from several threads."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]


def apply(job: Job, output: _Output) -> Done:
    """Carries one job out. What was written stays when it raises: ApplyError, OSError, or what `again` is said of."""
    stop = threading.Event()
    with disk.locked(job.root), LayerStream(job.blob, job.diff_id, job.memory) as layer:

        def report() -> None:
            told, starved = 0, False
            while not stop.wait(_PROGRESS_SECONDS):
                if layer.offset != told:
                    told = layer.offset
                    output.say({"offset": told})
                elif layer.waiting > STARVED_SECONDS and not starved:
                    starved = True
                    output.say({"starved": True})

        reporter = threading.Thread(target=report, name="progress", daemon=True)
        reporter.start()
        try:
            extracted = extract(
                TarReader(layer.chunks()), job.root, job.lowers, detached=job.detached, filled=job.whole or job.over
            )
            layer.verify(job.diff_id)
        finally:
            stop.set()
            reporter.join()
        uncompressed, diff_id = layer.uncompressed, layer.diff_id
    implied = {os.fsdecode(path): takes for path, takes in extracted.implied.items()}
    return Done(diff_id, uncompressed, extracted.entries, layer.identity, implied)


def work(requests: BinaryIO, answers: int) -> None:
    """Jobs until there are no more."""
    os.umask(0)
    output = _Output(answers)
    for line in requests:
        job = Job(**json.loads(line))
        try:
            output.say({"done": asdict(apply(job, output))})
        except (NeedsParent, StartedOver, Starved) as reason:
            output.say({"again": type(reason).__name__})
        except (ApplyError, OSError, MemoryError) as error:
            told = _told(error, job)
            output.say({"error": {"code": told.code, "message": told.message, "hint": told.hint}})


def _told(error: BaseException, job: Job) -> ApplyError:
    if isinstance(error, OSError):
        return of_os_error(error, f"layer {job.digest}")
    if isinstance(error, MemoryError):
        return ApplyError(f"layer {job.digest}: out of memory", code="RESOURCE_EXHAUSTED")
    assert isinstance(error, ApplyError)
    return error
