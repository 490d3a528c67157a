"""Decompressors that are programs of their own, by media type: containerd's stream processors.

    # /etc/shoal/stream-processors.toml, or --stream-processors
    [stream_processors."xz"]
    accepts = ["application/vnd.oci.image.layer.v1.tar+xz"]
    returns = "application/vnd.oci.image.layer.v1.tar"
    path = "xz"
    args = ["-dc"]
    env = ["XZ_DEFAULTS=--memlimit=64MiB"]

A program reads a layer's blob from its standard input and writes what it becomes to its standard output; one that ends
with another status than 0 says that the layer is broken. What one returns may be another one's to read, or compressed
as layers are. It runs as this service does: the file is root's to write.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from shoal_bus.errors import FailedPrecondition, NotFound

DEFAULT_FILE = Path("/etc/shoal/stream-processors.toml")
MAX_PAYLOADS_BYTES = 1 << 20
_KNOWN = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1\.tar(\+(gzip|zstd))?|docker\.image\.rootfs\.diff\.tar(\.(gzip|zstd))?)"
)
"""What needs no program."""
_MEDIA_TYPE = "STREAM_PROCESSOR_MEDIATYPE"


class Processor(BaseModel):
    """One program, as containerd's configuration has it. `name` is what payloads are for."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="", exclude=True)
    accepts: list[str] = Field(min_length=1)
    returns: str = Field(min_length=1)
    path: str = Field(min_length=1)
    args: list[str] = []
    env: list[str] = []


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stream_processors: dict[str, Processor] = {}


def load(path: Path) -> Mapping[str, Processor]:
    """The programs of a file by the media types they accept; none where there is no file. FAILED_PRECONDITION."""
    try:
        told = _File.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise FailedPrecondition(f"{path}: not a configuration of stream processors: {reason}") from None
    found: dict[str, Processor] = {}
    for name, one in told.stream_processors.items():
        processor = one.model_copy(update={"name": name})
        for media_type in processor.accepts:
            if found.setdefault(media_type, processor) is not processor:
                raise FailedPrecondition(f"{path}: {name}: {media_type} is another one's already")
    for media_type, processor in found.items():
        last = [media_type, *(one.returns for one in chain(found, media_type))]
        if len(last) > len(found) + 1:
            raise FailedPrecondition(f"{path}: {processor.name}: {media_type} becomes itself again")
        if not _KNOWN.fullmatch(last[-1]):
            raise FailedPrecondition(f"{path}: {processor.name}: nothing reads {last[-1]}, which it returns")
    return found


def chain(processors: Mapping[str, Processor], media_type: str) -> list[Processor]:
    """The programs that a layer of that type goes through, one after another."""
    found: list[Processor] = []
    while media_type in processors and len(found) <= len(processors):
        found.append(processors[media_type])
        media_type = found[-1].returns
    return found


def programs(processors: Mapping[str, Processor], media_type: str, payloads: Mapping[str, str]) -> list[dict[str, Any]]:
    """The same as a worker is told of them, with what each is given."""
    found = []
    for one in chain(processors, media_type):
        environment = [*one.env, f"{_MEDIA_TYPE}={media_type}"]
        told: dict[str, Any] = {"command": [one.path, *one.args], "environment": environment}
        found.append(told | ({"payload": payloads[one.name]} if one.name in payloads else {}))
        media_type = one.returns
    return found


def read_payloads(directory: Path, name: str) -> dict[str, str]:
    """The payloads of a request, in base64 by the processors' names. NOT_FOUND, FAILED_PRECONDITION."""
    try:
        fd = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise NotFound(f"payloads {name}: aren't in {directory}") from None
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_PAYLOADS_BYTES + 1)
    try:
        told = json.loads(data) if len(data) <= MAX_PAYLOADS_BYTES else None
        if not isinstance(told, dict):
            raise TypeError
        for value in told.values():
            base64.b64decode(value, validate=True)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        limit = f"at most {MAX_PAYLOADS_BYTES} bytes"
        raise FailedPrecondition(f"payloads {name}: must be JSON of base64, {limit}") from None
    return told
