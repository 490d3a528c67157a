"""Errors: gRPC's canonical codes, one sentence, and the way they travel.

A handler raises one of these; the harness puts `code` and `message` into the headers of NATS's micro protocol
(`Nats-Service-Error-Code`, `Nats-Service-Error`), and the client raises the same class again. The gateway maps `code`
to a gRPC status by name. Codes: https://grpc.github.io/grpc/core/md_doc_statuscodes.html
"""

from __future__ import annotations

import errno
import sqlite3
from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """gRPC's canonical status codes, by name and number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ShoalError(Exception):
    """Something a caller has to know: `code`, one sentence that says what is wrong, and (`hint`) the mend.

    >>> str(NotFound("image docker.io/library/nginx:latest: not found", hint="pull it first"))
    'image docker.io/library/nginx:latest: not found (pull it first)'
    """

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, message: str, *, hint: str = "") -> None:
        # One line: it becomes a header, a log field and a line on somebody's terminal.
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Cancelled(ShoalError):
    code = Code.CANCELLED


class Unknown(ShoalError):
    code = Code.UNKNOWN


class InvalidArgument(ShoalError):
    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(ShoalError):
    code = Code.DEADLINE_EXCEEDED


class NotFound(ShoalError):
    code = Code.NOT_FOUND


class AlreadyExists(ShoalError):
    code = Code.ALREADY_EXISTS


class PermissionDenied(ShoalError):
    code = Code.PERMISSION_DENIED


class ResourceExhausted(ShoalError):
    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(ShoalError):
    code = Code.FAILED_PRECONDITION


class Aborted(ShoalError):
    code = Code.ABORTED


class OutOfRange(ShoalError):
    code = Code.OUT_OF_RANGE


class Unimplemented(ShoalError):
    code = Code.UNIMPLEMENTED


class Internal(ShoalError):
    code = Code.INTERNAL


class Unavailable(ShoalError):
    code = Code.UNAVAILABLE


class DataLoss(ShoalError):
    code = Code.DATA_LOSS


class Unauthenticated(ShoalError):
    code = Code.UNAUTHENTICATED


BY_CODE: dict[Code, type[ShoalError]] = {c.code: c for c in ShoalError.__subclasses__()}


def from_wire(code: str, message: str, hint: str = "") -> ShoalError:
    """The error a reply's headers describe; a code this version doesn't know becomes UNKNOWN."""
    try:
        known = Code[code]
    except KeyError:
        return Unknown(f"{message} [{code}]", hint=hint)
    return BY_CODE.get(known, Unknown)(message, hint=hint)


def from_exception(error: BaseException) -> ShoalError:
    """What a caller is told of any exception: never a traceback, never a `repr`.

    The operating system's own errors keep their meaning (ENOSPC is RESOURCE_EXHAUSTED, EACCES PERMISSION_DENIED);
    everything unforeseen is INTERNAL with the exception's class name, and its details are the service's log's.
    """
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, sqlite3.Error):
        return _from_sqlite_error(error)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("the request ran out of time")
    if isinstance(error, OSError):
        return _from_os_error(error)
    return Internal(f"internal error ({type(error).__name__})", hint="see the service's log for the request id")


def _from_os_error(error: OSError) -> ShoalError:
    where = f" ({error.filename})" if error.filename else ""
    text = f"{error.strerror or type(error).__name__}{where}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"no space left on device{where}", hint="free some space and try again")
    if isinstance(error, ConnectionError):
        return Unavailable(text)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceExhausted(text)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(text, hint="shoal's services run as root")
    return Internal(text)


def _from_sqlite_error(error: sqlite3.Error) -> ShoalError:
    extended = getattr(error, "sqlite_errorcode", 0)
    code = extended & 0xFF  # the primary code
    if code == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE:
        return ResourceExhausted("no space left for the service's database", hint="free some space and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable("the service's database is busy", hint="try again")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DataLoss("the service's database is damaged", hint="restore it from a copy")
    return Internal(f"internal error ({type(error).__name__})", hint="see the service's log for the request id")
