"""Blobs on disk: an OCI image layout (image-spec, image-layout.md), `blobs/<algorithm>/<hex>`, and ingests beside it.

Image records are in the database, so `index.json` names none. A blob is written under `ingests/`, synced, and renamed
to its place: what is under `blobs/` is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shoal_bus.types import check_digest

ALGORITHMS = ("sha256", "sha512")
_BLOCK = 1 << 20


class Layout:
    """The directories of one node's blobs."""

    def __init__(self, root: Path) -> None:
        self.root, self.ingests = root, root / "ingests"
        self.ingests.mkdir(mode=0o700, parents=True, exist_ok=True)
        for algorithm in ALGORITHMS:
            (root / "blobs" / algorithm).mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_once(root / "oci-layout", {"imageLayoutVersion": "1.0.0"})
        _write_once(root / "index.json", {"schemaVersion": 2, "manifests": []})

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        algorithm, _, value = check_digest(digest).partition(":")
        return self.root / "blobs" / algorithm / value

    def place(self, file: Path, digest: str) -> None:
        """Renames a synced file to its place, and syncs the directory."""
        path = self.path(digest)
        file.rename(path)
        sync(path.parent)

    def remove(self, digest: str) -> None:
        """Removes a blob, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """The size of every blob that is there, by digest; what isn't named like one is none."""
        found = {}
        for algorithm in ALGORITHMS:
            for entry in os.scandir(self.root / "blobs" / algorithm):
                digest = f"{algorithm}:{entry.name}"
                with suppress(ValueError, FileNotFoundError):
                    found[check_digest(digest)] = entry.stat(follow_symlinks=False).st_size
        return found

    def ingest(self, file: str) -> Path:
        """The file of an ingest."""
        return self.ingests / file

    def ingest_files(self) -> Iterator[str]:
        """The files of all ingests."""
        return (entry.name for entry in os.scandir(self.ingests))


def sync(path: Path) -> None:
    """fsync(2) of a file or a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of a few bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def hash_file(path: Path, algorithm: str) -> tuple[hashlib._Hash, int]:
    """A file's hash, ready to be continued, and how many bytes went into it; nothing for a file that isn't there."""
    hashed, size = hashlib.new(algorithm), 0
    with suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
            size += len(block)
    return hashed, size


def _write_once(path: Path, document: dict[str, object]) -> None:
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(document))
        beside.rename(path)
