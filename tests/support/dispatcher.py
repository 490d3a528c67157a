"""A dispatcher of the test service's commands, as a process: `python -m tests.support.dispatcher --root …`.

`--die` has it kill itself: `before` its first call, `asked` in the middle of it, `answered` before the outcome is
recorded, `ended` before the command is acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import Any

from shoal_bus import dispatcher as under_test
from shoal_bus.process import Process, run_service
from shoal_bus.verb import verbs_of

from tests.support import bus_service as demo


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--die", default="")


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(where: str) -> None:
    """Has this process die at an instruction of its own: a real `kill -9`, at a moment that no other could hit."""
    kind = under_test.Dispatcher
    ask, end, acknowledge = kind._ask, kind._end, kind._acknowledge

    async def dying_ask(self: Any, *given: Any) -> Any:
        if where == "before":
            _die()
        if where == "asked":
            asyncio.get_running_loop().call_later(0.3, _die)
        return await ask(self, *given)

    def dying_end(self: Any, *given: Any) -> None:
        if where == "answered":
            _die()
        end(self, *given)

    async def dying_acknowledge(self: Any, *given: Any) -> None:
        if where == "ended":
            _die()
        await acknowledge(self, *given)

    for name, dying in {"_ask": dying_ask, "_end": dying_end, "_acknowledge": dying_acknowledge}.items():
        setattr(kind, name, dying)


async def setup(process: Process) -> None:
    if process.args.die:
        _arm(process.args.die)
    process.service("hosts a dispatcher")
    await process.stack.enter_async_context(under_test.dispatching(process, list(verbs_of(demo))))


if __name__ == "__main__":
    run_service("host", setup, arguments=arguments, needs_root=False)
