"""A decompressor that is a program: the blob goes to its standard input, what it writes is the layer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO

from shoal_bus.archive.decompress import CHUNK
from shoal_bus.archive.zstd_frames import Source

from shoal_snapshot.apply.decompress import Decompressor
from shoal_snapshot.apply.errors import ApplyError, Corrupt
from shoal_snapshot.syscalls import die_with_parent


def external(command: Sequence[str], environment: Sequence[str]) -> Decompressor:
    """The decompressor that runs `command`, with `environment` (`KEY=value`) beside this process's own.

    DATA_LOSS when the program fails; FAILED_PRECONDITION when it can't be run.
    """

    def decompress(source: Source) -> Iterator[bytes]:
        import subprocess  # not every worker needs it

        parent = os.getpid()
        told = {key: value for key, _, value in (pair.partition("=") for pair in environment)}
        try:
            program = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=os.environ | told, bufsize=0, preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
            )  # fmt: skip
        except OSError as error:
            message = f"stream processor {command[0]}: {error.strerror}"
            raise ApplyError(message, hint="see the configuration", code="FAILED_PRECONDITION") from None
        assert program.stdin is not None
        assert program.stdout is not None
        feeder = _Feeder(source, program.stdin)
        feeder.start()
        try:
            while chunk := program.stdout.read(CHUNK):
                yield chunk
        finally:
            program.stdout.close()  # one that still writes is told so
            with suppress(subprocess.TimeoutExpired):
                program.wait(_LAST_SECONDS)
            program.kill()
            status = program.wait()
            feeder.join()
        if feeder.error is not None:
            raise feeder.error
        if status:
            raise Corrupt(f"the layer can't be decompressed: {command[0]} ended with status {status}")

    return decompress


_LAST_SECONDS = 5.0
"""How long a program may take to end once it has closed its output."""


class _Feeder(threading.Thread):
    """Writes a blob to a program until either has enough."""

    def __init__(self, source: Source, pipe: IO[bytes]) -> None:
        super().__init__(name="feeder", daemon=True)
        self._source, self._pipe = source, pipe
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while data := self._source.read(CHUNK):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._pipe.fileno(), rest) :]
        except BrokenPipeError:
            pass  # it has what it needs, or has failed: its status tells
        except Exception as error:  # noqa: BLE001 (handed over)
            self.error = error
        finally:
            self._pipe.close()
