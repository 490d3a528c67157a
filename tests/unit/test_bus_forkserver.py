"""A process that forks workers: they answer, they end with their input, and none outlives what forked it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from shoal_bus.forkserver import ForkServer, Gone, Worker

_MODULE = """
import os, signal, sys, time

def work(requests, answers):
    for line in requests:
        word = line.decode().strip()
        if word == "raise":
            raise RuntimeError("as it was told")
        if word == "print":
            print("a library's words", flush=True)
        if word == "exit":
            sys.exit(5)
        if word == "sleep":
            time.sleep(60)
        if word == "fds":
            word = " ".join(sorted(os.listdir("/proc/self/fd")))
        os.write(answers, f"{word}\\n".encode())
"""


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ForkServer]:
    name = f"worker_of_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(psutil.Process().children())
    with _standard_error(tmp_path / "log"):
        server = ForkServer(name)
    try:
        yield server
    finally:
        started = [child for child in psutil.Process().children() if child not in before]
        started += [each for child in started for each in child.children(recursive=True)]
        await server.close()
        assert not [child for child in started if _alive(child)]


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _standard_error(path: Path) -> Iterator[None]:
    """What is forked meanwhile writes to a file."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


async def _ask(worker: Worker, word: str) -> str:
    worker.writer.write(f"{word}\n".encode())
    return (await asyncio.wait_for(worker.reader.readline(), 10)).decode().strip()


async def test_workers_answer_side_by_side_and_end_with_their_input(server: ForkServer) -> None:
    workers = await asyncio.gather(*(server.fork() for _ in range(8)))
    assert len({worker.pid for worker in workers}) == 8
    assert await asyncio.gather(*(_ask(worker, f"hello {worker.pid}") for worker in workers)) == [
        f"hello {worker.pid}" for worker in workers
    ]
    for worker in workers:
        assert not worker.ended
        worker.writer.close()
    assert await asyncio.gather(*(worker.wait() for worker in workers)) == [0] * 8


async def test_how_a_worker_ended_is_told(server: ForkServer, tmp_path: Path) -> None:
    killed, raising, exiting = await server.fork(), await server.fork(), await server.fork()
    killed.kill()
    assert await killed.wait() == -signal.SIGKILL
    killed.kill()  # it has ended already
    assert (await _ask(raising, "raise"), await raising.wait()) == ("", 1)
    assert (await _ask(exiting, "exit"), await exiting.wait()) == ("", 5)
    assert "RuntimeError: as it was told" in (tmp_path / "log").read_text()


async def test_what_a_library_prints_is_no_answer(server: ForkServer, tmp_path: Path) -> None:
    assert await _ask(await server.fork(), "print") == "print"
    assert (tmp_path / "log").read_text() == "a library's words\n"


async def test_a_worker_has_no_descriptors_but_its_own(server: ForkServer) -> None:
    others = [os.open("/", os.O_RDONLY) for _ in range(3)]
    try:
        found = (await _ask(await server.fork(), "fds")).split()
    finally:
        for fd in others:
            os.close(fd)
    assert len(found) == 5  # the standard ones, the connection, and the one that reads the directory


async def test_signals_for_the_group_are_the_services(server: ForkServer) -> None:
    worker = await server.fork()
    for pid in (worker.pid, server._pid):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert await _ask(worker, "still here") == "still here"


async def test_workers_die_with_the_server_and_the_next_has_one_again(server: ForkServer) -> None:
    worker = await server.fork()
    os.kill(server._pid, signal.SIGKILL)
    assert await asyncio.wait_for(worker.wait(), 10) == -signal.SIGKILL
    assert not psutil.pid_exists(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    assert await _ask(await server.fork(), "hello") == "hello"


_WITH_UVLOOP = """
import asyncio, sys, uvloop
from shoal_bus.forkserver import ForkServer

async def main():
    server = ForkServer(sys.argv[1])
    workers = [await server.fork() for _ in range(4)]
    for number, worker in enumerate(workers):
        worker.writer.write(f"{number}\\n".encode())
        assert await worker.reader.readline() == f"{number}\\n".encode()
    await server.close()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def test_uvloop_takes_nothing_from_workers(tmp_path: Path) -> None:
    """Its library closes descriptors in forks, by their numbers."""
    (tmp_path / "worker_with_uvloop.py").write_text(textwrap.dedent(_MODULE))
    command = [sys.executable, "-c", _WITH_UVLOOP, "worker_with_uvloop"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=30, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_worker_that_nobody_waits_for_ends(server: ForkServer) -> None:
    await server.fork()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        asked = asyncio.create_task(server.fork())
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    kept = await server.fork()
    async with asyncio.timeout(10):
        while len(psutil.Process(server._pid).children()) > 2:
            await asyncio.sleep(0.01)
    gc.collect()
    assert await _ask(kept, "hello") == "hello"
    async with asyncio.timeout(10):
        while len(list(Path("/proc/self/fd").iterdir())) > before + 2:
            await asyncio.sleep(0.01)


async def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    with _standard_error(tmp_path / "log"):
        server = ForkServer("no_such_module_anywhere")
        try:
            for _ in range(2):
                with pytest.raises(Gone):
                    await server.fork()
        finally:
            await server.close()
    assert (tmp_path / "log").read_text().count("ModuleNotFoundError") == 2
    assert "no_such_module_anywhere" not in sys.modules
