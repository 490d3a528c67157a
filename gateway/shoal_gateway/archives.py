"""Archives between a client's stream and the content service: through a FIFO among the node's archives.

The content service opens the entry that it is told the name of, below `<state>/archives`; no byte touches the bus.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from shoal_bus.api.content import ARCHIVES

from shoal_gateway.places import place

T = TypeVar("T")

_CHUNK = 256 << 10
_POLL_SECONDS = 0.01


class Entry:
    """A FIFO among the archives."""

    def __init__(self, place: Path) -> None:
        self._place, self.name = place, place.name
        self._fd = -1

    async def feed(self, chunks: AsyncIterator[bytes]) -> None:
        """Writes all of `chunks` and their end, once somebody reads the FIFO, and as long as somebody does."""
        while self._fd < 0:
            try:
                self._fd = os.open(self._place, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nobody reads it yet (fifo(7))
                    raise
                await asyncio.sleep(_POLL_SECONDS)
        try:
            async for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    try:
                        view = view[os.write(self._fd, view) :]
                    except BlockingIOError:
                        await self._ready(
                            asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer
                        )
        except BrokenPipeError:
            return  # whoever reads it has had enough, and the operation tells why
        self.close()

    async def drain(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Passes on all that is written to the FIFO, from when somebody does until nobody does any more."""
        loop = asyncio.get_running_loop()
        self._fd = os.open(self._place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        await self._ready(loop.add_reader, loop.remove_reader)  # before anybody has written, its end isn't one
        while True:
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                await self._ready(loop.add_reader, loop.remove_reader)
                continue
            if not data:
                return
            await write(data)

    def close(self) -> None:
        """Whoever is at the other end sees the end of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _ready(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        ready = asyncio.Event()
        add(self._fd, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._fd)


@contextmanager
def entry(state: Path) -> Iterator[Entry]:
    """A new FIFO for the length of the block, in the state directory of the node."""
    with place(state / ARCHIVES) as path:
        os.mkfifo(path, 0o600)
        made = Entry(path)
        try:
            yield made
        finally:
            path.unlink(missing_ok=True)  # before its end is seen, so that nobody opens it for nothing
            made.close()


async def beside(work: Coroutine[Any, Any, T], copying: Coroutine[Any, Any, None]) -> T:
    """The result of `work` while bytes are copied for it: when either fails, or this is cancelled, both are ended.

    What has been copied when the work is done is all that it wanted; of an error of both, the work's is raised.
    """
    worker, copier = asyncio.create_task(work), asyncio.create_task(copying)
    try:
        await asyncio.wait({worker, copier}, return_when=asyncio.FIRST_EXCEPTION)
        if not worker.done():
            worker.cancel()  # the copying failed
            await asyncio.wait({worker})
            copier.result()
        if worker.exception() is None and not copier.done():
            await copier
        return worker.result()
    finally:
        for task in (worker, copier):
            task.cancel()
        await asyncio.gather(worker, copier, return_exceptions=True)
