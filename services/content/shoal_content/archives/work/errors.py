"""What can be wrong with bytes, as a worker tells it: a canonical code by name, one sentence, the mend."""

from __future__ import annotations

import errno


class WorkError(Exception):
    """A job that can't be done."""

    code = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.code = code or type(self).code


class Corrupt(WorkError):
    """The bytes aren't what they should be: truncated, wrong digest, not an archive."""

    code = "DATA_LOSS"


class Unacceptable(WorkError):
    """What is whole, but mustn't be taken."""

    code = "FAILED_PRECONDITION"


def of_os_error(error: OSError, what: str) -> WorkError:
    """What the kernel refused, said of `what`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(
            f"{what}: no space left on device", hint="free some space and try again", code="RESOURCE_EXHAUSTED"
        )
    if error.errno == errno.EPIPE:
        return WorkError(f"{what}: its reader is gone", code="CANCELLED")
    return WorkError(f"{what}: {error.strerror or type(error).__name__}")


def shown(name: str) -> str:
    """A name of an archive for a message: printable, and not too long."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 200 else f"{text[:197]}…"
