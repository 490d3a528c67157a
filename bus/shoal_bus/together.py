"""Things done at once, and in threads, none of which outlives whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def gather(*works: Coroutine[Any, Any, Any]) -> list[Any]:
    """What each of them comes to, in their order. The first that fails is what this fails with; the rest is cancelled,
    and over by then."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What it comes to: it goes on to its end also if this is cancelled, as what undoes something must."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A function in a thread; one that is cancelled is waited for: a thread can't be stopped."""
    return await to_its_end(asyncio.to_thread(function, *args, **kwargs))


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
