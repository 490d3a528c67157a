"""Types that several services share: descriptors, platforms, mounts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from shoal_bus.message import Message

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def is_digest(value: str) -> bool:
    """Whether `value` is a digest that `check_digest` takes."""
    return _DIGEST.fullmatch(value) is not None


def check_digest(value: str) -> str:
    """`value` itself, or ValueError: `sha256:` or `sha512:` and the hash in lower-case hexadecimal (OCI image spec)."""
    if not is_digest(value):
        raise ValueError(f"{value[:80]!r} is not a sha256 or sha512 digest")
    return value


Digest = Annotated[str, AfterValidator(check_digest)]
Labels = dict[str, str]


class Platform(Message):
    """An OCI platform: `os`/`architecture`[/`variant`]."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(Message):
    """An OCI content descriptor (image-spec, descriptor.md)."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    media_type: str
    digest: Digest
    size: int = Field(ge=0)
    urls: list[str] = []
    """Where the content may be fetched besides its registry: of layers that may not be distributed."""
    annotations: Labels = {}
    platform: Platform | None = None
    data: bytes = b""
    """The content itself, embedded, where whoever made the descriptor did so."""
    artifact_type: str = ""


class AnyMessage(Message):
    """A message of any type, as a client packed it (protobuf's Any): kept as it is, and looked into by nobody here."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    type_url: str = ""
    value: bytes = b""

    @property
    def type(self) -> str:
        """The type's full name: what stands behind the last slash of a protobuf type's URL."""
        return self.type_url.rpartition("/")[2]


class Mount(Message):
    """One entry of the list a snapshotter yields and a shim mounts: the arguments of mount(8), containerd's fields.

    `target` is relative to the root the whole list is mounted on; empty means that root itself.
    """

    type: str
    source: str
    target: str = ""
    options: list[str] = []


class Stdio(Message):
    """Where a process's standard streams go: absolute paths of FIFOs, `file:///…` URIs, or empty for /dev/null.

    With `terminal`, the process gets a pseudo-terminal; its master side is copied between `stdin` and `stdout`.
    """

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class User(Message):
    """The user a process runs as (OCI runtime-spec, config.md#posix-platform-user)."""

    uid: int = Field(default=0, ge=0, le=0xFFFFFFFE)
    gid: int = Field(default=0, ge=0, le=0xFFFFFFFE)
    additional_gids: list[int] = []


class Filter(Message):
    """Containerd's filter language: an item is listed when any of `filters` matches it; none lists all."""

    filters: list[str] = []


Compression = Literal["none", "gzip", "zstd"]
