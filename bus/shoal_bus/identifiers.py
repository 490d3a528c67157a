"""What may name a container, a namespace, a snapshot's owner: containerd's rule for identifiers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator

from shoal_bus.errors import InvalidArgument

MAX_LENGTH = 76
_REMEMBERED = 1024
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*")


@lru_cache(_REMEMBERED)
def check_identifier(value: str, what: str = "id") -> str:
    """`value` itself, or INVALID_ARGUMENT: letters and digits, with single `.`, `_` or `-` between, at most 76.

    >>> check_identifier("web-1.a_b")
    'web-1.a_b'
    """
    if not value:
        raise InvalidArgument(f"{what} must not be empty")
    if len(value) > MAX_LENGTH:
        raise InvalidArgument(f"{what} {value[:20]!r}…: {len(value)} characters, at most {MAX_LENGTH} are allowed")
    if not _IDENTIFIER.fullmatch(value):
        raise InvalidArgument(f"{what} {value!r}: must be letters and digits, with single '.', '_' or '-' between them")
    return value


def _validated(value: str) -> str:
    try:
        return check_identifier(value)
    except InvalidArgument as error:
        raise ValueError(error.message) from None


Identifier = Annotated[str, AfterValidator(_validated)]
"""A pydantic field type that holds an identifier."""
