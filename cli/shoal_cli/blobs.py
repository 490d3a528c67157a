"""Blobs on a command line: named by the beginning of a digest, written to a file that is whole or not there."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shoal_bus.api import content
from shoal_bus.blobs import download
from shoal_bus.client import Client
from shoal_bus.errors import DataLoss, InvalidArgument, NotFound, from_exception
from shoal_bus.types import check_digest

_BEGINNING = re.compile(r"(?:(sha256|sha512):)?([0-9a-f]{4,128})")
_BLOCK = 1 << 20


async def digest_of(client: Client, given: str) -> str:
    """The digest that `given` is, or that it is the beginning of, with or without its algorithm.

    INVALID_ARGUMENT where several blobs of the namespace begin so.
    """
    try:
        return check_digest(given)
    except ValueError:
        found = _BEGINNING.fullmatch(given)
    if found is None:
        raise InvalidArgument(f"{given!r}: is no digest", hint="as sha256:4bf5122f3444…, or its first digits")
    expression = f'digest~="^{found[1] or "[^:]+"}:{found[2]}"'
    matching = await client.collect(content.BLOB_LIST, content.ListBlobs(filters=[expression]))
    if not matching:
        raise NotFound(f"blob {given}: not found")
    if len(matching) > 1:
        raise InvalidArgument(f"blob {given}: {len(matching)} blobs begin so", hint="give more digits")
    return matching[0].digest


@contextmanager
def source(file: str) -> Iterator[BinaryIO]:
    """A file to read from; `-` is standard input. NOT_FOUND, PERMISSION_DENIED."""
    if file == "-":
        yield sys.stdin.buffer
        return
    with _told(Path(file)):
        opened = Path(file).open("rb")  # noqa: SIM115 (closed below)
    with opened:
        yield opened


async def save(client: Client, digest: str, path: Path) -> None:
    """A blob as the file `path`, which is there once it is whole: what was broken off is gone on with the next time."""
    value = digest.partition(":")[2]
    part = path.with_name(f".{path.name}.{value[:16]}.part")
    with _told(path):
        hashed, offset = await asyncio.to_thread(_begun, part, digest)
        with await asyncio.to_thread(part.open, "ab", 0) as file:
            async with aclosing(download(client, digest, offset=offset)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
                    hashed.update(piece)
            if hashed.hexdigest() != value:
                part.unlink()
                raise DataLoss(f"blob {digest}: what came has another digest", hint="try again")
            await asyncio.to_thread(os.fsync, file.fileno())
        part.replace(path)


def _begun(part: Path, digest: str) -> tuple[hashlib._Hash, int]:
    """What there is of a blob already: its hash, and how much it is."""
    hashed, size = hashlib.new(digest.partition(":")[0]), 0
    with suppress(FileNotFoundError), part.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
            size += len(block)
    return hashed, size


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """The operating system's word on a file of ours, as an error with a code."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"{path}: {(error.strerror or '').lower()}") from None
    except OSError as error:
        raise from_exception(error) from None
