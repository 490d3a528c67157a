"""Messages: pydantic models carried as msgpack maps.

A `Message` ignores fields it doesn't know, so that an older reader understands a newer writer. A `Request` refuses
them, so that a misspelt field is an error for who wrote it and not a setting that silently has no effect.
Times are aware `datetime`s, carried as msgpack's own timestamp extension (type -1).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from shoal_bus.errors import InvalidArgument

M = TypeVar("M", bound="Message")

_MAX_DEPTH_ERRORS = 3


class Message(BaseModel):
    """What travels on the bus: replies, events, and the parts they are made of."""

    model_config = ConfigDict(extra="ignore", defer_build=True)

    def pack(self) -> bytes:
        """This message as a msgpack map, without the fields that are None."""
        return pack(self.model_dump(exclude_none=True))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The message `data` holds; an empty payload is a message of defaults. INVALID_ARGUMENT if it isn't one."""
        return cls.of(unpack(data) if data else {})

    @classmethod
    def of(cls, value: Any) -> Self:
        """The message an already decoded msgpack value stands for; INVALID_ARGUMENT if it doesn't."""
        if not isinstance(value, dict):
            raise InvalidArgument(f"{cls.__name__}: the payload must be a msgpack map, not {type(value).__name__}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise invalid(error) from None


class Request(Message):
    """What a caller sends. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Empty(Message):
    """A reply that says no more than that it was done."""


def invalid(error: ValidationError) -> InvalidArgument:
    """What is wrong with a message, in a sentence that names its fields."""
    return InvalidArgument(f"{error.title}: {_describe(error)}")


def _describe(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    told = [f"{'.'.join(map(str, p['loc'])) or 'value'}: {_in_a_sentence(p['msg'])}" for p in problems]
    told = told[:_MAX_DEPTH_ERRORS]
    more = len(problems) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _in_a_sentence(text: str) -> str:
    """pydantic's word on what is wrong, with a validator's own as it wrote it."""
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def pack(value: Any) -> bytes:
    """Any msgpack value (maps, lists, text, bytes, numbers, aware datetimes) as bytes."""
    return msgpack.packb(value, datetime=True, use_bin_type=True)  # type: ignore[no-any-return]


def unpack(data: bytes) -> Any:
    """The msgpack value `data` holds, or INVALID_ARGUMENT."""
    try:
        return msgpack.unpackb(data, timestamp=3, raw=False, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, OSError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise InvalidArgument(f"the payload isn't msgpack: {error}") from None


def now() -> datetime:
    """The present, as messages carry it: aware, in UTC."""
    return datetime.now(UTC)
