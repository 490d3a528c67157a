"""What clients pack into an Any: OCI's documents as JSON, runc's options as protobuf, and what is kept as it came.

A type's URL is its full name, with or without a prefix that ends with a slash. Containerd's own URLs of OCI's Go types
(typeurl) have a version in them, `types.containerd.io/opencontainers/runtime-spec/1/Process`; their values are JSON.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.message import DecodeError, Message
from shoal_bus.api import runtime
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import AnyMessage

from shoal_gateway.proto.containerd.runc.v1.oci_pb2 import Options

M = TypeVar("M", bound=Message)

RUNC_OPTIONS = Options.DESCRIPTOR.full_name


def kept(packed: AnyProto) -> AnyMessage:
    """An Any as the bus has it."""
    return AnyMessage(type_url=packed.type_url, value=packed.value)


def told(packed: AnyMessage) -> AnyProto:
    """An Any as clients have it."""
    return AnyProto(type_url=packed.type_url, value=packed.value)


def document_of(packed: AnyProto, what: str) -> dict[str, Any]:
    """The JSON object that an Any holds. INVALID_ARGUMENT names `what` it isn't."""
    try:
        document = json.loads(packed.value)
    except (ValueError, RecursionError):
        raise InvalidArgument(f"{what}: {packed.type_url or 'what was given'} isn't JSON") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"{what}: must be a JSON object")
    return document


def message_of(packed: AnyProto, kind: type[M], what: str) -> M:
    """The message of `kind` that an Any holds. INVALID_ARGUMENT for another type, or bytes that are none."""
    if packed.type_url.rpartition("/")[2] != kind.DESCRIPTOR.full_name:
        raise InvalidArgument(f"{what}: {packed.type_url!r} instead of {kind.DESCRIPTOR.full_name}")
    try:
        return kind.FromString(packed.value)
    except DecodeError:
        raise InvalidArgument(f"{what}: no {kind.DESCRIPTOR.full_name}") from None


def runc_options(options: Options) -> runtime.RuncOptions:
    """Runc's options as the bus has them."""
    return runtime.RuncOptions(
        binary_name=options.binary_name,
        root=options.root,
        systemd_cgroup=options.systemd_cgroup,
        no_pivot_root=options.no_pivot_root,
        no_new_keyring=options.no_new_keyring,
        io_uid=options.io_uid,
        io_gid=options.io_gid,
        shim_cgroup=options.shim_cgroup,
        criu_image_path=options.criu_image_path,
        criu_work_path=options.criu_work_path,
    )


def packed(message: Message) -> AnyProto:
    """A message as an Any, as containerd packs it: by its full name alone."""
    return AnyProto(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())
