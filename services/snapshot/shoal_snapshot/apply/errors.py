"""What can be wrong with a layer, as a worker tells it: a canonical code by name, one sentence, the mend."""

from __future__ import annotations

import errno

from shoal_bus.archive.errors import ArchiveError as ApplyError
from shoal_bus.archive.errors import Corrupt, Unacceptable, no_space, shown

__all__ = ["ApplyError", "Corrupt", "NeedsParent", "StartedOver", "Starved", "Unacceptable", "of_os_error", "shown"]


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
        return no_space(what)
    if error.errno in _SHORT:
        return ApplyError(text, hint="the host is short of it, not the disk", code="RESOURCE_EXHAUSTED")
    return Unacceptable(text) if error.errno in _REFUSED else ApplyError(text)
