"""A service as a fork of `shoal up`: what services share is loaded once, and is in memory once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import IO

from shoal_bus.forks import die_with, let_go

from shoal_cli import forks

SHARED = (
    "shoal_bus.api.content", "shoal_bus.api.network", "shoal_bus.api.runtime", "shoal_bus.api.snapshot",
    "shoal_bus.client", "shoal_bus.process", "structlog", "uvloop",
)  # fmt: skip
"""What all of them load."""


class Forked:
    """Runs the `main` of a package's `__main__`, with these arguments; to be used as a `subprocess.Popen` is."""

    def __init__(self, package: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        parent = os.getpid()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid = os.fork()
        except BaseException:
            os.close(reader)
            raise
        finally:
            if os.getpid() == parent:
                os.close(writer)
        if not self.pid:
            _become(package, arguments, environment, writer, parent)
        self.stdout: IO[bytes] | None = os.fdopen(reader, "rb", buffering=0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Reaps it: its exit status, or a signal's number below zero. Once."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _become(package: str, arguments: Sequence[str], environment: Mapping[str, str], output: int, parent: int) -> None:
    """This fork is that service, and never returns."""
    code = 1
    try:
        let_go(output)
        os.setsid()  # Ctrl-C at the terminal is for the node: the order in which services stop matters
        die_with(parent)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir("/")
        forks.take_streams(os.open(os.devnull, os.O_RDWR), output, output, lines=True)
        name = package.replace("_", "-")
        forks.name(name, " ".join((name, *arguments)))
        sys.argv = [name, *arguments]
        importlib.import_module(f"{package}.__main__").main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does with what nobody has caught)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
