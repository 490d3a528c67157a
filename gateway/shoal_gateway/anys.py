"""What clients pack into an Any and the bus only keeps: there and back."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from shoal_bus.api.runtime import Packed


def packed_in(message: Message, field: str) -> Packed | None:
    """The Any in a message's field, as the bus has it; None where it isn't set."""
    if not message.HasField(field):
        return None
    found: AnyMessage = getattr(message, field)
    return Packed(type_url=found.type_url, value=found.value)


def any_of(packed: Packed | None) -> AnyMessage | None:
    """The Any again, as it came."""
    return None if packed is None else AnyMessage(type_url=packed.type_url, value=packed.value)
