"""Checkpoints in the content store: a tar archive of CRIU's image files, and the specification they belong to.

The media types and what they hold are containerd's (images, mediatypes.go).
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from shoal_bus.blobs import download, upload
from shoal_bus.client import Client
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import AnyMessage, Descriptor

IMAGES = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
SPEC = "application/vnd.containerd.container.checkpoint.config.v1+proto"
_FETCHED, _WRITTEN = "checkpoint", "checkpointed"


def fetched_to(bundle: Path) -> Path:
    """Where the image files are that a task is restored from: they go with its bundle."""
    return bundle / _FETCHED


async def fetch(client: Client, digest: str, bundle: Path) -> None:
    """Has the image files of a checkpoint in a task's bundle. NOT_FOUND; INVALID_ARGUMENT for what isn't one."""
    with tempfile.TemporaryFile(dir=bundle) as archive:
        async for data in download(client, digest):
            await asyncio.to_thread(archive.write, data)
        archive.seek(0)
        await asyncio.to_thread(_extract, archive, fetched_to(bundle), digest)


def _extract(archive: IO[bytes], directory: Path, digest: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as opened:
            for member, file in _files(opened, digest):
                fd = os.open(directory / member, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with os.fdopen(fd, "wb") as written:
                    shutil.copyfileobj(file, written)
    except (tarfile.TarError, EOFError, FileExistsError) as error:
        raise InvalidArgument(f"checkpoint {digest}: isn't an archive of CRIU's image files: {error}") from None


def _files(archive: tarfile.TarFile, digest: str) -> Iterator[tuple[str, IO[bytes]]]:
    """CRIU writes plain files into one directory: nothing else is taken from an archive, which may be anybody's."""
    for member in archive:
        name = member.name.removeprefix("./").rstrip("/")
        if member.isdir() and name in ("", "."):
            continue
        file = archive.extractfile(member) if member.isreg() else None
        if file is None or not name or name.startswith(".") or "/" in name:
            raise InvalidArgument(f"checkpoint {digest}: {member.name!r} can't be one of CRIU's image files")
        yield name, file


@asynccontextmanager
async def written_to(bundle: Path) -> AsyncIterator[Path]:
    """A directory for a checkpoint on its way to the content store: gone behind the block."""
    directory = bundle / _WRITTEN
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    try:
        yield directory
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, True)


async def store(client: Client, directory: Path, spec: AnyMessage) -> list[Descriptor]:
    """Writes a checkpoint's image files and its specification as blobs: their descriptors, in this order."""
    with tempfile.TemporaryFile(dir=directory.parent) as archive:
        await asyncio.to_thread(_archive, directory, archive)
        images = await _stored(client, IMAGES, archive)
    return [images, await _stored(client, SPEC, io.BytesIO(_packed(spec)))]


async def _stored(client: Client, media_type: str, source: IO[bytes]) -> Descriptor:
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    return Descriptor(media_type=media_type, digest=await upload(client, source, total=size), size=size)


def _archive(directory: Path, archive: IO[bytes]) -> None:
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as opened:
        for path in sorted(directory.iterdir()):
            if path.is_file() and not path.is_symlink():
                opened.add(path, arcname=path.name, recursive=False)


def _packed(message: AnyMessage) -> bytes:
    """A `google.protobuf.Any` on the wire: two fields, each of a length and so many bytes."""
    fields = ((0x0A, message.type_url.encode()), (0x12, message.value))
    return b"".join(bytes([key]) + _varint(len(data)) + data for key, data in fields if data)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
