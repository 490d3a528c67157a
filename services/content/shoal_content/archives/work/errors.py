"""What can be wrong with bytes, as a worker tells it: a canonical code by name, one sentence, the mend."""

from __future__ import annotations

import errno

from shoal_bus.archive.errors import ArchiveError as WorkError
from shoal_bus.archive.errors import Corrupt, Unacceptable, no_space, shown

__all__ = ["Corrupt", "Unacceptable", "WorkError", "of_os_error", "shown"]


def of_os_error(error: OSError, what: str) -> WorkError:
    """What the kernel refused, said of `what`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(what)
    if error.errno == errno.EPIPE:
        return WorkError(f"{what}: its reader is gone", code="CANCELLED")
    return WorkError(f"{what}: {error.strerror or type(error).__name__}")
