"""Decompressors that are programs of their own, by media type: containerd's stream processors.

    # /etc/shoal/stream-processors.toml, or --stream-processors
    [stream_processors."xz"]
    accepts = ["application/vnd.oci.image.layer.v1.tar+xz"]
    returns = "application/vnd.oci.image.layer.v1.tar"
    path = "xz"
    args = ["-dc"]
    env = ["XZ_DEFAULTS=--memlimit=64MiB"]

A program reads a layer's blob from its standard input and writes what it becomes to its standard output; one that ends
with another status than 0 says that the layer is broken. It runs as this service does: the file is root's to write.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from shoal_bus.errors import FailedPrecondition

DEFAULT_FILE = Path("/etc/shoal/stream-processors.toml")


class Processor(BaseModel):
    """One program, as containerd's configuration has it."""

    model_config = ConfigDict(extra="forbid")

    accepts: list[str] = Field(min_length=1)
    returns: str = Field(pattern=r"^application/vnd\.(oci\.image\.layer\.v1\.tar|docker\.image\.rootfs\.diff\.tar)$")
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
    for name, processor in told.stream_processors.items():
        for media_type in processor.accepts:
            if found.setdefault(media_type, processor) is not processor:
                raise FailedPrecondition(f"{path}: {name}: {media_type} is another one's already")
    return found
