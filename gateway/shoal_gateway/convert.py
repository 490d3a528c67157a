"""What several of the protocol's services share: the bus's types as protobuf's and back, labels, masks, batches."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from shoal_bus.errors import InvalidArgument, NotFound
from shoal_bus.identifiers import check_identifier
from shoal_bus.types import Descriptor, Labels, Mount, check_digest

from shoal_gateway.proto.containerd.types import descriptor_pb2, mount_pb2

T = TypeVar("T")

BATCH = 100
"""How many items containerd puts into one message of a list that is a stream."""
LONGEST_LABEL = 4096
"""Bytes of a label's key and value together."""
_SHOWN = 64
_PLAIN = re.compile(r"[\w.:/@-]*")
_EPOCH, _DAY_SECONDS = datetime(1970, 1, 1, tzinfo=UTC), 86400


def descriptor_of(told: descriptor_pb2.Descriptor) -> Descriptor:
    """A descriptor as the bus has it. INVALID_ARGUMENT where its digest or its size can't be one."""
    if told.size < 0:
        raise InvalidArgument(f"descriptor {told.digest}: a size of {told.size} bytes")
    return Descriptor(
        media_type=told.media_type,
        digest=digest_of(told.digest),
        size=told.size,
        annotations=dict(told.annotations),
    )


def descriptor_told(descriptor: Descriptor) -> descriptor_pb2.Descriptor:
    """A descriptor as containerd's clients have it."""
    return descriptor_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations,
    )


def sought(id: str, missing: str) -> str:
    """`id`, if there can be something by it. NOT_FOUND says what is `missing`, as with containerd, which just looks."""
    try:
        return check_identifier(id)
    except InvalidArgument:
        raise NotFound(f"{missing}: not found") from None


def digest_of(text: str) -> str:
    """`text`, if it is a digest; INVALID_ARGUMENT."""
    try:
        return check_digest(text)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def mounts_of(told: Iterable[mount_pb2.Mount]) -> list[Mount]:
    """A mount list as the bus has it."""
    return [Mount(type=one.type, source=one.source, target=one.target, options=list(one.options)) for one in told]


def mounts_told(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    """A mount list as containerd's clients have it."""
    return [mount_pb2.Mount(type=one.type, source=one.source, target=one.target, options=one.options) for one in mounts]


def timestamp(moment: datetime) -> Timestamp:
    """A moment as protobuf has it."""
    since = moment - _EPOCH  # protobuf's own conversion takes five times as long
    return Timestamp(seconds=since.days * _DAY_SECONDS + since.seconds, nanos=since.microseconds * 1000)


def moment_of(told: Timestamp) -> datetime:
    """A moment as the bus has it. INVALID_ARGUMENT where it is none."""
    try:
        return told.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"timestamp of {told.seconds} s and {told.nanos} ns: {error}") from None


def labels_of(told: Mapping[str, str]) -> Labels:
    """Labels as they are kept: those without a value aren't. INVALID_ARGUMENT."""
    return {key: value for key, value in check_labels(told).items() if value}


def check_labels(told: Mapping[str, str]) -> Labels:
    """The labels themselves. INVALID_ARGUMENT for one that is too long, or has no key."""
    for key, value in told.items():
        if not key:
            raise InvalidArgument("label keys must not be empty")
        length = len(key.encode()) + len(value.encode())
        if length > LONGEST_LABEL:
            raise InvalidArgument(
                f"label key and value length ({length} bytes) greater than maximum size ({LONGEST_LABEL} bytes),"
                f" key: {key[:_SHOWN]}"
            )
    return dict(told)


def paths_of(
    mask: FieldMask, of: str, *, whole: Sequence[str] = ("labels",), maps: Sequence[str] = ("labels",)
) -> list[str]:
    """The paths of a field mask: of `whole`, or one entry of a map of `maps`. INVALID_ARGUMENT names any other."""
    for path in mask.paths:
        name, _, key = path.partition(".")
        if path not in whole and not (name in maps and key):
            raise InvalidArgument(f"cannot update {path!r} field on {of}")
    return list(mask.paths)


def quote(text: str) -> str:
    """Text in quotation marks, as Go writes it."""
    return f'"{text}"' if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


async def batches(items: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    """Items by the hundred, as containerd streams its lists; nothing where there are none."""
    batch: list[T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
