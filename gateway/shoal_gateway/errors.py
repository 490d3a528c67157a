"""Errors as gRPC tells them: the bus's canonical codes by name, and never UNKNOWN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from shoal_bus.errors import AlreadyExists, Code, NotFound, from_exception
from shoal_bus.message import invalid

LONGEST_MESSAGE = 2048
"""Bytes of a sentence, each of which is three in a trailer if it isn't ASCII."""


def status_of(error: BaseException) -> tuple[Code, str]:
    """The status and the one sentence that a client is told of any exception.

    What makes no message of the bus was the client's: it is said what is wrong with it.
    """
    told = invalid(error) if isinstance(error, ValidationError) else from_exception(error)
    code = Code.INTERNAL if told.code in (Code.UNKNOWN, Code.OK) else told.code
    return code, _shown(str(told))


def _shown(message: str) -> str:
    """A sentence with what a client gave in it, which may be long: clients refuse trailers of more than 8 KiB."""
    told = message.encode(errors="replace")
    return message if len(told) <= LONGEST_MESSAGE else told[:LONGEST_MESSAGE].decode(errors="ignore") + "…"


@contextmanager
def worded(missing: str, there: str = "") -> Iterator[None]:
    """What isn't there, or is there already, in containerd's words: its clients show them, without any hint of ours."""
    try:
        yield
    except NotFound as error:
        if error.message.startswith("lease ") and not missing.startswith("lease "):  # the one in the call's header
            raise NotFound("lease does not exist: not found") from None
        raise NotFound(f"{missing}: not found") from None
    except ValidationError:
        if not missing:
            raise
        raise NotFound(f"{missing}: not found") from None  # what can't be there isn't
    except AlreadyExists:
        if not there:
            raise
        raise AlreadyExists(f"{there}: already exists") from None
