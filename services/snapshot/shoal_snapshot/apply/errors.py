"""What can be wrong with a layer, as a worker tells it: a canonical code by name, one sentence, the mend."""

from __future__ import annotations

import errno
import os


class ApplyError(Exception):
    """A layer that can't be applied."""

    code = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.code = code or type(self).code


class Corrupt(ApplyError):
    """The bytes aren't what they should be: truncated, wrong digest, not an archive."""

    code = "DATA_LOSS"


class Unacceptable(ApplyError):
    """The archive is whole, but can't be, or mustn't be, carried out."""

    code = "FAILED_PRECONDITION"


class NeedsParent(Exception):
    """What the layers below hold decides how this one comes out: it has to be unpacked on top of them."""


class Starved(Exception):
    """The blob comes too slowly for a worker, or for the memory it takes, to be kept waiting for it."""


class StartedOver(Exception):
    """The file that was being followed has been replaced by another: its first bytes were wrong."""


_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_REFUSED = frozenset(
    {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EPERM, errno.EEXIST, errno.EINVAL, errno.EMLINK,
     errno.ENOENT, errno.EISDIR, errno.EFBIG, errno.EXDEV, errno.ERANGE, errno.E2BIG}
)  # fmt: skip


def of_os_error(error: OSError, what: str) -> ApplyError:
    """What the kernel refused, said of the entry `what`."""
    text = f"{what}: {error.strerror or type(error).__name__}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApplyError(
            f"{what}: no space left on device", hint="free some space and try again", code="RESOURCE_EXHAUSTED"
        )
    if error.errno in _SHORT:
        return ApplyError(text, hint="the host is short of it, not the disk", code="RESOURCE_EXHAUSTED")
    return Unacceptable(text) if error.errno in _REFUSED else ApplyError(text)


def shown(name: bytes) -> str:
    """A name of an archive for a message: printable, and not too long."""
    text = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 200 else f"{text[:197]}…"
