"""The kernel's refusals, as canonical errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2.netlink.exceptions import NetlinkError
from shoal_bus.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
)

_BY_ERRNO: dict[int, type[ShoalError]] = {
    errno.EEXIST: AlreadyExists,
    errno.EPERM: PermissionDenied,
    errno.EACCES: PermissionDenied,
    errno.ENODEV: NotFound,
    errno.EINVAL: InvalidArgument,
    errno.ERANGE: InvalidArgument,
    errno.EADDRNOTAVAIL: InvalidArgument,
    errno.ENETUNREACH: FailedPrecondition,
    errno.EHOSTUNREACH: FailedPrecondition,
    errno.EBUSY: FailedPrecondition,
    errno.EOPNOTSUPP: FailedPrecondition,
    errno.ENOMEM: ResourceExhausted,
    errno.ENOBUFS: ResourceExhausted,
    errno.EXFULL: ResourceExhausted,
}


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raises what the kernel refused within the block as the canonical error, `what` in front."""
    try:
        yield
    except NetlinkError as error:
        text = f"{what}: {os.strerror(error.code).lower()}"
        raise _BY_ERRNO.get(error.code, Internal)(text) from error
