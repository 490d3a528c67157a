"""`shoal`: hands the command to the node where there is one, and runs it here where there isn't."""

from __future__ import annotations

import os
import sys

from shoal_cli import telling
from shoal_cli.commandserver.client import hand_over


def main() -> None:
    telling.open_missing()
    arguments = sys.argv[1:] or ["--help"]
    if arguments in (["version"], ["--version"]):
        # Before the command line's own imports, which take ten times as long as this.
        from shoal_cli import __version__

        print(f"shoal {__version__}")
        return
    code = hand_over(arguments)
    if code is not None:
        os._exit(code)  # there is nothing of ours to be written or undone
    from shoal_cli.app import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
