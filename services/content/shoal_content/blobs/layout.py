"""Blobs on disk: an OCI image layout (image-spec, image-layout.md), `blobs/<algorithm>/<hex>`, and ingests beside it.

Image records are in the database, so `index.json` names none. A blob is written under `ingests/`, synced, and linked to
its place: what is under `blobs/` is whole. `claims/` has further links to blobs, under names that can't be guessed;
`quarantine/` the bytes of blobs that were found damaged, which nothing here ever deletes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
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
        self.claims, self.quarantined = root / "claims", root / "quarantine"
        for directory in (self.ingests, self.claims, self.quarantined):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for algorithm in ALGORITHMS:
            (root / "blobs" / algorithm).mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_once(root / "oci-layout", {"imageLayoutVersion": "1.0.0"})
        _write_once(root / "index.json", {"schemaVersion": 2, "manifests": []})

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        algorithm, _, value = check_digest(digest).partition(":")
        return self.root / "blobs" / algorithm / value

    def place(self, file: Path, digest: str) -> None:
        """Links a synced file to its place, instead of what may be there. `file` stays, and the directory isn't synced.

        Only inside a write transaction: whoever starts removes what it finds without a record.
        """
        path = self.path(digest)
        try:
            os.link(file, path)
        except FileExistsError:
            if not path.samefile(file):
                beside = self.ingests / secrets.token_hex(16)
                os.link(file, beside)
                beside.replace(path)

    def is_placed(self, file: Path, digest: str) -> bool:
        """Whether a blob's place has that very file."""
        try:
            return self.path(digest).samefile(file)
        except FileNotFoundError:
            return False

    def quarantine(self, digest: str, inode: int) -> None:
        """Takes a damaged blob's bytes, if its place still has that file, to where they are kept aside."""
        path = self.path(digest)
        name = f"{digest.replace(':', '-')}.{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.rename(self.quarantined / name)

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
