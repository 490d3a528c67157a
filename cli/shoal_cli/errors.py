"""What a command ends with: one line on standard error, and an exit code that says what kind of error it was."""

from __future__ import annotations

import re

from shoal_bus.errors import Code, ShoalError

from shoal_cli.telling import tell

RUN_FAILED = 125
"""What `run` and `exec` exit with when shoal, not the process, failed: its own status may be anything else."""
NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""What they exit with when the command can't be executed, or isn't there: a shell's own (POSIX, 2.8.2)."""
INTERRUPTED = 130

EXIT_CODES: dict[Code, int] = {
    Code.INVALID_ARGUMENT: 2,
    Code.OUT_OF_RANGE: 2,
    Code.UNAVAILABLE: 3,
    Code.NOT_FOUND: 4,
    Code.ALREADY_EXISTS: 5,
    Code.PERMISSION_DENIED: 6,
    Code.UNAUTHENTICATED: 6,
    Code.FAILED_PRECONDITION: 7,
    Code.RESOURCE_EXHAUSTED: 8,
    Code.DEADLINE_EXCEEDED: 9,
    Code.DATA_LOSS: 10,
}

EXPLAINED = (
    "Exit codes: 0 done; 1 another error; 2 wrong usage; 3 no node or bus there; 4 not found; 5 exists already; "
    "6 not permitted; 7 not in this state; 8 out of room; 9 out of time; 10 data damaged; 130 interrupted. "
    "`run`, `exec` and `attach` exit with the process's status; `run` and `exec` with 125 when shoal itself failed, "
    "126 when the command can't be executed, 127 when there is no such command."
)
_NO_COMMAND = re.compile(r"executable file .*not found|exec: \".*\": .*no such file or directory", re.IGNORECASE)
_NO_EXECUTABLE = re.compile(r"exec: \".*\": |open executable|exec format error", re.IGNORECASE)
"""What runc and crun say of a command."""


def exit_code(error: ShoalError) -> int:
    """The exit code that stands for an error's canonical code."""
    return EXIT_CODES.get(error.code, 1)


def start_exit_code(error: ShoalError) -> int:
    """The exit code for a process that wasn't started."""
    if error.code is Code.FAILED_PRECONDITION:
        if _NO_COMMAND.search(error.message):
            return NOT_FOUND
        if _NO_EXECUTABLE.search(error.message):
            return NOT_EXECUTABLE
    return RUN_FAILED


def report(error: ShoalError) -> None:
    """Prints an error as people read it: `shoal: <what is wrong> (<what to do>)`."""
    tell(f"shoal: {error} [{error.code.name}]\n")
