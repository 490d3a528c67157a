"""The same for each of several things, many at once: what can be done is done, what can't is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from shoal_bus.errors import ShoalError

from shoal_cli.errors import exit_code, report

_AT_ONCE = 32


async def for_each(names: Iterable[str], action: Callable[[str], Awaitable[object]], *, quiet: bool = False) -> int:
    """Does `action` for each name, and prints the name or reports the error, in the order of the names.

    Returns the exit code: that of the first error, or 0.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def act(name: str) -> None:
        async with slots:
            await action(name)

    acting = [(name, asyncio.create_task(act(name))) for name in names]
    try:
        return await _tell(acting, quiet=quiet)
    finally:
        for _, task in acting:
            task.cancel()
        await asyncio.gather(*(task for _, task in acting), return_exceptions=True)


async def _tell(acting: Iterable[tuple[str, asyncio.Task[None]]], *, quiet: bool) -> int:
    code = 0
    for name, task in acting:
        try:
            await task
        except ShoalError as error:
            report(error)
            code = code or exit_code(error)
        else:
            if not quiet:
                print(name)
    return code
