"""One process of the node: started, watched, started again when it fails, stopped.

A child dies with us, however we die (prctl(2), PR_SET_PDEATHSIG): what a killed `shoal up` leaves behind would keep
the bus's files, and the next `up` from starting. Services are written to be killed. Containers aren't our children.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Protocol

from shoal_bus import forks
from shoal_bus.errors import FailedPrecondition

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.25, 10.0
HEALTHY_SECONDS = 30.0
"""A child that ran for so long is started again at once when it fails."""
STOP_SECONDS = 15.0
START_ATTEMPTS = 3
"""A child that fails so often before it was ever ready keeps the node from starting."""


def backoff(failures: int) -> float:
    """How long to wait before the next start, after so many failures in a row: 0.25 s, doubled up to 10 s."""
    return float(min(FIRST_BACKOFF_SECONDS * 2 ** max(0, failures - 1), LONGEST_BACKOFF_SECONDS))


class Running(Protocol):
    """A process as `subprocess.Popen` has it: what it writes, also as errors, is on `stdout`."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def wait(self) -> int:
        """Reaps it: its exit status, or a signal's number below zero."""
        ...


def started(command: Callable[[], Sequence[str]], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A program, as a process that dies with us."""
    parent = os.getpid()
    return subprocess.Popen(
        list(command()),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(environment), cwd="/",
        start_new_session=True,  # Ctrl-C at the terminal is for us: the order in which they stop matters
        preexec_fn=lambda: forks.die_with(parent),  # noqa: PLW1509 (no threads here)
    )  # fmt: skip


class Child:
    """A process that is kept running. `on_line` gets each line it writes and says whether that line means ready."""

    def __init__(
        self,
        name: str,
        begin: Callable[[], Running],
        on_line: Callable[[str, bytes], bool],
        on_restart: Callable[[str, str, float], None],
    ) -> None:
        self.name, self._begin = name, begin
        self._on_line, self._on_restart = on_line, on_restart
        self._process: Running | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._was_ready = False
        self._stopping = False
        self._last_line = ""

    @property
    def pid(self) -> int:
        """Its process id; 0 while it doesn't run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Starts it and keeps it running; returns at once."""
        self._keeper = asyncio.create_task(self._keep(), name=self.name)

    async def ready(self, seconds: float) -> None:
        """Returns when it answers. FAILED_PRECONDITION, with its own words, when it can't be started."""
        assert self._keeper is not None
        waiting = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({waiting, self._keeper}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._keeper.done():
            self._keeper.result()
        if not self._ready.is_set():
            raise FailedPrecondition(f"{self.name} isn't ready after {seconds:.0f} s", hint="see its log lines above")

    async def stop(self) -> None:
        """SIGTERM, a while for what is in flight, SIGKILL."""
        self._stopping = True
        if self._keeper is None:
            return
        if self._process is None:
            self._keeper.cancel()
        else:
            self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._keeper}, timeout=STOP_SECONDS)
        if not done:
            self._signal(signal.SIGKILL)
            await asyncio.wait({self._keeper})

    def kill(self) -> None:
        """SIGKILL, for who is in a hurry."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep(self) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            status = await self._run()
            if self._stopping:
                return
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
            failures = 1 if time.monotonic() - started > HEALTHY_SECONDS else failures + 1
            if not self._was_ready and failures >= START_ATTEMPTS:
                raise FailedPrecondition(f"{self.name} {how}: {self._last_line or 'it said nothing'}")
            pause = backoff(failures)
            self._on_restart(self.name, how, pause)
            await asyncio.sleep(pause)

    async def _run(self) -> int:
        """Runs it once, to its end: its exit status."""
        process = self._begin()
        self._process = process
        reader = asyncio.create_task(self._read(process))
        try:
            await _exited(process)
        finally:
            self._process = None
            self._ready.clear()
            # What it wrote last is there already; a grandchild may hold the pipe open for ever.
            await asyncio.wait({reader}, timeout=0.5)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        return process.wait()

    async def _read(self, process: Running) -> None:
        assert process.stdout is not None
        stream = asyncio.StreamReader(limit=1 << 20)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), process.stdout
        )
        try:
            while line := await _line(stream):
                text = line.decode(errors="replace").strip()
                if text and not text.startswith("{"):
                    self._last_line = text
                if self._on_line(self.name, line):
                    self._ready.set()
                    self._was_ready = True
        finally:
            transport.close()


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line; one that is longer than the buffer comes in pieces."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _exited(process: Running) -> None:
    """Returns when the process has ended; it isn't reaped yet, so that its id stays its own."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    fd = os.pidfd_open(process.pid)
    loop.add_reader(fd, _settle, ended)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
