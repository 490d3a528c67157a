"""Errors as gRPC tells them: the bus's canonical codes by name, and never UNKNOWN."""

from __future__ import annotations

import grpc
from pydantic import ValidationError
from shoal_bus.errors import Code, from_exception
from shoal_bus.message import invalid


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and the one sentence that a client is told of any exception.

    What makes no message of the bus was the client's: it is said what is wrong with it.
    """
    told = invalid(error) if isinstance(error, ValidationError) else from_exception(error)
    code = Code.INTERNAL if told.code in (Code.UNKNOWN, Code.OK) else told.code
    return grpc.StatusCode[code.name], str(told)
