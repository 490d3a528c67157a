"""What can be wrong with bytes, as a worker tells it: a canonical code by name, one sentence, the mend."""

from __future__ import annotations

import os


class ArchiveError(Exception):
    """Work on an archive, or on a layer, that can't be done."""

    code = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.code = code or type(self).code


class Corrupt(ArchiveError):
    """The bytes aren't what they should be: truncated, wrong digest, not an archive."""

    code = "DATA_LOSS"


class Unacceptable(ArchiveError):
    """What is whole, but can't be, or mustn't be, carried out."""

    code = "FAILED_PRECONDITION"


def no_space(what: str) -> ArchiveError:
    """The disk is full, said of `what`."""
    return ArchiveError(
        f"{what}: no space left on device", hint="free some space and try again", code="RESOURCE_EXHAUSTED"
    )


def shown(name: bytes | str) -> str:
    """A name of an archive for a message: printable, and not too long."""
    text = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 200 else f"{text[:197]}…"
