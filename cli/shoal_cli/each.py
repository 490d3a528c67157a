"""The same for each of several things: what can be done is done, what can't is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from shoal_bus.errors import ShoalError

from shoal_cli.errors import exit_code, report


async def for_each(names: Iterable[str], action: Callable[[str], Awaitable[object]], *, quiet: bool = False) -> int:
    """Does `action` for each name and prints the name; an error is reported and the next one's turn comes.

    Returns the exit code: that of the first error, or 0.
    """
    code = 0
    for name in names:
        try:
            await action(name)
        except ShoalError as error:
            report(error)
            code = code or exit_code(error)
        else:
            if not quiet:
                print(name)
    return code
