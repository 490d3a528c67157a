"""A decompressor of programs: the blob goes to the first one's standard input, what the last one writes is the layer.

Each is started as containerd starts its stream processors: it is told what it is given in `STREAM_PROCESSOR_MEDIATYPE`,
and has its payload, where there is one, at file descriptor 3.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import IO

from shoal_bus.archive.decompress import CHUNK
from shoal_bus.archive.zstd_frames import Source

from shoal_snapshot.apply.decompress import Decompressor, Program
from shoal_snapshot.apply.errors import ApplyError, Corrupt, shown
from shoal_snapshot.syscalls import die_with_parent

_PAYLOAD_FD = 3
_LAST_SECONDS = 5.0
"""How long a program may take to end once it has closed its output."""
_TOLD_BYTES = 400
"""Of what programs say on their standard errors."""


def external(programs: Sequence[Program]) -> Decompressor:
    """The decompressor that runs programs, each reading what the one before it writes.

    DATA_LOSS when one fails, with what they said; FAILED_PRECONDITION when one can't be run.
    """

    def decompress(source: Source) -> Iterator[bytes]:
        with ExitStack() as stack:
            running = _Pipeline(stack, programs)
            feeder = _Feeder(source, running.input)
            feeder.start()
            try:
                while chunk := running.output.read(CHUNK):
                    yield chunk
            finally:
                failed = running.end()
                feeder.join()
        if feeder.error is not None:
            raise feeder.error
        if failed:
            raise Corrupt(f"the layer can't be decompressed: {failed}")

    return decompress


class _Pipeline:
    """Programs that run. `end` leaves none."""

    def __init__(self, stack: ExitStack, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._running: list[subprocess.Popen[bytes]] = []
        read, write = os.pipe()
        self._said = _Said(read)
        try:
            with os.fdopen(write, "wb", 0) as said:
                for program in programs:
                    one = _start(program, self._running[-1].stdout if self._running else None, said)
                    self._running.append(one)
                    for pipe in (one.stdin, one.stdout):
                        if pipe is not None:
                            stack.callback(pipe.close)
        except BaseException:
            self.end()
            raise
        for one in self._running[:-1]:
            assert one.stdout is not None
            one.stdout.close()  # it is the next one's
        first, last = self._running[0].stdin, self._running[-1].stdout
        assert first is not None
        assert last is not None
        self.input, self.output = first, last

    def end(self) -> str:
        """Ends what still runs; says what is wrong with the first one that failed, if any did."""
        if self._running and self._running[-1].stdout is not None:
            self._running[-1].stdout.close()  # one that still writes is told so
        for one in reversed(self._running):
            with suppress(subprocess.TimeoutExpired):
                one.wait(_LAST_SECONDS)
            one.kill()
            one.wait()
        said = self._said.end()
        for at, one in enumerate(self._running):
            # One that the next one doesn't listen to any more is none that has failed.
            unheard = one.returncode == -signal.SIGPIPE and at + 1 < len(self._running)
            if one.returncode and not unheard:
                why = f": {said}" if said else ""
                return f"{self._programs[at].command[0]} ended with status {one.returncode}{why}"
        return ""


def _start(program: Program, source: IO[bytes] | None, said: IO[bytes]) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    told = {key: value for key, _, value in (pair.partition("=") for pair in program.environment)}
    payload = _payload(program.payload) if program.payload is not None else -1

    def prepare() -> None:
        die_with_parent(parent)
        if payload >= 0:
            os.dup2(payload, _PAYLOAD_FD)

    try:
        return subprocess.Popen(
            program.command, stdin=source if source is not None else subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=said, env=os.environ | told, bufsize=0, pass_fds=(_PAYLOAD_FD,) if payload >= 0 else (),
            preexec_fn=prepare,  # noqa: PLW1509
        )  # fmt: skip
    except OSError as error:
        message = f"stream processor {program.command[0]}: {error.strerror}"
        raise ApplyError(message, hint="see the configuration", code="FAILED_PRECONDITION") from None
    finally:
        if payload >= 0:
            os.close(payload)


def _payload(data: bytes) -> int:
    """A file in memory that a child can have at its descriptor 3: this process has something else there."""
    try:
        fcntl.fcntl(_PAYLOAD_FD, fcntl.F_GETFD)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        if nothing != _PAYLOAD_FD:
            os.dup2(nothing, _PAYLOAD_FD, inheritable=False)
            os.close(nothing)
    fd = os.memfd_create("payload", os.MFD_CLOEXEC)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Said(threading.Thread):
    """Reads what programs say until nobody can say any more, and keeps the beginning of it."""

    def __init__(self, fd: int) -> None:
        super().__init__(name="said", daemon=True)
        self._fd, self._data = fd, b""
        self.start()

    def run(self) -> None:
        with os.fdopen(self._fd, "rb", 0) as pipe:
            while data := pipe.read(4096):
                self._data += data[: _TOLD_BYTES - len(self._data)]

    def end(self) -> str:
        """What was said, on one line; a descendant that has outlived its program isn't waited for."""
        self.join(1.0)
        return shown(b" ".join(self._data.split()))


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
