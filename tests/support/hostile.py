"""What a client that is broken, or means harm, may send: every method of the gateway, with each field made wrong.

Walks protobuf's own descriptors, so that a method or a field that is added is tried without anybody's doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

GARBAGE = b"\xff\xff\xff\xff"
PENDING = "PENDING"
"""What is still under way when it has been waited for long enough."""
_TEXTS: dict[str, Callable[[str], str]] = {
    "empty": lambda tag: "",
    "slash": lambda tag: f"{tag}/b",
    "parent": lambda tag: f"../../{tag}",
    "nul": lambda tag: f"{tag}\0b",
    "long": lambda tag: f"{tag}{'x' * 5000}",
    "space": lambda tag: f"{tag} b",
    "umlaut": lambda tag: f"{tag}ä",
    "operator": lambda tag: f"=={tag}",
}
"""Of a tag that nobody else has: what one method makes, another one mustn't come upon."""
_OF_MAPS = ("empty", "nul", "long")
_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-1, (1 << 31) - 1, -(1 << 31)),
    FieldDescriptor.CPPTYPE_INT64: (-1, (1 << 63) - 1, -(1 << 63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_DEEPEST = 4
_SUBSCRIBED_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0
_UNKNOWN = 99
"""A number that no enumeration has."""


@dataclass(frozen=True)
class Try:
    """One call."""

    method: str
    """As gRPC's path."""
    what: str
    """What is wrong with it."""
    data: bytes
    requests_stream: bool
    replies_stream: bool
    metadata: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """As `Tasks/Create stdin long`."""
        return f"{self.method.rpartition('.')[2]} {self.what}"


def tries(services: Sequence[ServiceDescriptor], namespace: str, bases: Mapping[str, Message]) -> Iterator[Try]:
    """Every method, wrong in every way. `bases` are requests that are right, by `Service/Method`, to be made wrong."""
    for service in services:
        for method in service.methods:
            base = bases.get(f"{service.full_name}/{method.name}") or GetMessageClass(method.input_type)()
            yield _try(method, "garbage", GARBAGE, namespace)
            yield _try(method, "nothing", b"", namespace)
            data = base.SerializeToString()
            yield _try(method, "no namespace", data, "")
            for name, text in (("slash", "a/b"), ("long", "x" * 77), ("operator", "=="), ("dots", "..")):
                yield _try(method, f"namespace: {name}", data, text)
            for what, wrong in mutations(base, method.name.lower()):
                yield _try(method, what, wrong.SerializeToString(), namespace)


def mutations(base: Message, tag: str, deep: int = 0) -> Iterator[tuple[str, Message]]:
    """Copies of a message with one field of it wrong, and which and how. `tag` is part of any wrong text."""
    texts = {name: text(tag) for name, text in _TEXTS.items()}
    for field in base.DESCRIPTOR.fields:
        for what, value in _wrong(field, base, texts, tag, deep):
            copy = type(base)()
            copy.CopyFrom(base)
            _set(copy, field, value)
            yield f"{field.name}{what}", copy


def _wrong(
    field: FieldDescriptor, base: Message, texts: Mapping[str, str], tag: str, deep: int
) -> Iterator[tuple[str, Any]]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        if kind.fields_by_name["value"].message_type is None:
            yield from ((f"[{name}]", {texts[name]: "x"}) for name in _OF_MAPS)
            yield from ((f" of {name}", {"x": texts[name]}) for name in _OF_MAPS)
        return
    if kind is None:
        for what, value in _scalars(field, texts):
            yield what, [value] if field.is_repeated else value
        return
    if kind.full_name == "google.protobuf.FieldMask":
        for name, text in {**texts, "unknown": "nothing.at.all", "id": "id", "created": "created_at"}.items():
            yield f" of {name}", GetMessageClass(kind)(paths=[text])
        return
    if kind.full_name == "google.protobuf.Any":
        kept = getattr(base, field.name) if not field.is_repeated else GetMessageClass(kind)()
        yield " without a type", GetMessageClass(kind)(value=b"{}")
        yield " unknown", GetMessageClass(kind)(type_url="nobody.knows/This", value=b"{}")
        yield " broken", GetMessageClass(kind)(type_url=kept.type_url, value=GARBAGE)
        yield " empty", GetMessageClass(kind)(type_url=kept.type_url, value=b"")
        yield " a list", GetMessageClass(kind)(type_url=kept.type_url, value=b"[" * 3000)
        return
    if deep >= _DEEPEST:
        return
    inner = getattr(base, field.name)
    one = (inner[0] if len(inner) else GetMessageClass(kind)()) if field.is_repeated else inner
    for what, value in mutations(one, tag, deep + 1):
        yield f".{what}", [value] if field.is_repeated else value


def _scalars(field: FieldDescriptor, texts: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if field.enum_type is not None:
        yield f" {_UNKNOWN}", _UNKNOWN
    elif field.type == FieldDescriptor.TYPE_STRING:
        yield from ((f" {name}", text) for name, text in texts.items())
    elif field.type == FieldDescriptor.TYPE_BYTES:
        yield from ((f" {name}", value) for name, value in (("empty", b""), ("garbage", GARBAGE)))
    else:
        yield from ((f" {number}", number) for number in _WHOLE.get(field.cpp_type, ()))


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    there = getattr(message, field.name)
    if isinstance(value, dict):
        there.clear()
        there.update(value)
    elif isinstance(value, list):
        del there[:]
        there.extend(value)
    elif isinstance(value, Message):
        there.CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _try(method: MethodDescriptor, what: str, data: bytes, namespace: str) -> Try:
    assert method.containing_service is not None
    metadata = (("containerd-namespace", namespace),) if namespace else ()
    path = f"/{method.containing_service.full_name}/{method.name}"
    return Try(path, what, data, method.client_streaming, method.server_streaming, metadata)


async def outcomes(channel: grpc.aio.Channel, wanted: Sequence[Try]) -> dict[Try, tuple[str, str]]:
    """How each ends: those of one method one after another, the methods beside one another."""
    of_methods: dict[str, list[Try]] = {}
    for one in wanted:
        of_methods.setdefault(one.method, []).append(one)
    found: dict[Try, tuple[str, str]] = {}

    async def work(some: Sequence[Try]) -> None:
        for one in some:
            found[one] = await outcome(channel, one)

    await asyncio.gather(*(work(some) for some in of_methods.values()))
    return found


async def outcome(channel: grpc.aio.Channel, one: Try) -> tuple[str, str]:
    """How a call ends: its code's name, and its sentence. `PENDING` for one that goes on."""
    patience = _SUBSCRIBED_SECONDS if one.method.endswith("/Subscribe") else _PATIENCE_SECONDS
    if one.requests_stream:
        return await _streamed(channel, one, patience)
    try:
        if one.replies_stream:
            stream = channel.unary_stream(one.method)(one.data, metadata=one.metadata, timeout=patience)
            async for _ in stream:
                pass
        else:
            await channel.unary_unary(one.method)(one.data, metadata=one.metadata, timeout=patience)
    except grpc.aio.AioRpcError as error:
        return _told(error.code(), error.details())
    return "OK", ""


async def _streamed(channel: grpc.aio.Channel, one: Try, patience: float) -> tuple[str, str]:
    """Of a call that is refused before it is written to, grpc.aio may know no more than that it can't be."""
    while True:
        call = channel.stream_stream(one.method)(metadata=one.metadata, timeout=patience)
        with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            await call.write(one.data)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
        told = _told(await call.code(), await call.details())
        if told != ("INTERNAL", "Internal error from Core"):
            return told


def _told(code: grpc.StatusCode, details: str | None) -> tuple[str, str]:
    return (PENDING if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name), details or ""
