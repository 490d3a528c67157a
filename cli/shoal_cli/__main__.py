"""`shoal`: runs the command line, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

from shoal_cli import telling


def main() -> None:
    telling.open_missing()
    if sys.argv[1:] in (["version"], ["--version"]):
        # Before the command line's own imports, which take ten times as long as this.
        from shoal_cli import __version__

        print(f"shoal {__version__}")
        return
    sys.exit(run(sys.argv[1:] or ["--help"]))


def run(arguments: list[str]) -> int:
    """Runs one command line to its exit code."""
    import typer
    from shoal_bus.errors import ShoalError

    from shoal_cli.app import app
    from shoal_cli.errors import INTERRUPTED, exit_code, report

    # typer exports only some of the classes whose base this is: every mistake in how a command was called.
    usage_error: type[Any] = typer.BadParameter.__mro__[1]
    try:
        code = app(arguments, prog_name="shoal", standalone_mode=False)
        sys.stdout.flush()
    except ShoalError as error:
        report(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads our output has had enough: not an error, and nothing more to be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except usage_error as error:
        context = error.ctx.command_path if error.ctx is not None else "shoal"
        telling.tell(f"shoal: {' '.join(error.format_message().split())} (see `{context} --help`)\n")
        return int(error.exit_code)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
