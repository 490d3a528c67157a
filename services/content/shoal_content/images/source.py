"""Where an image's blobs are to be found, and its documents read with what can be wrong with them."""

from __future__ import annotations

from typing import Protocol

from shoal_bus.errors import FailedPrecondition, NotFound
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.blobs.store import Store

MAX_DOCUMENTS_BYTES = 32 << 20
"""Of all manifests, indexes and configurations that one image leads to: each is parsed, which takes its time."""


class Source(Protocol):
    """Where an image's blobs are."""

    def size(self, digest: str) -> int | None:
        """A blob's size, or None where it isn't there."""

    def open(self, digest: str) -> bytes:
        """All of a small blob that is there."""


class StoreSource:
    """The blobs that a namespace sees."""

    def __init__(self, store: Store, namespace: str) -> None:
        self._store, self._namespace = store, namespace

    def size(self, digest: str) -> int | None:
        if not self._store.sees(self._namespace, digest):
            return None
        try:
            return self._store.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, digest: str) -> bytes:
        return self._store.open(self._namespace, digest)


class Documents:
    """What is read of a source for one purpose, which messages name: `image <name>`, say."""

    def __init__(self, source: Source, purpose: str) -> None:
        self._source, self._purpose, self._read = source, purpose, 0

    def has(self, descriptor: Descriptor) -> bool:
        """Whether a blob is there."""
        return self._source.size(descriptor.digest) is not None

    def require(self, descriptor: Descriptor) -> None:
        """NOT_FOUND for a blob that isn't there, FAILED_PRECONDITION for one of another size."""
        size = self._source.size(descriptor.digest)
        if size is None:
            which = f" for {descriptor.platform}" if descriptor.platform else ""
            raise NotFound(f"{self._purpose}: {descriptor.digest}{which} isn't there")
        if size != descriptor.size:
            raise FailedPrecondition(
                f"{self._purpose}: {descriptor.digest} has {size} bytes, its descriptor says {descriptor.size}"
            )

    def read(self, descriptor: Descriptor) -> bytes:
        """A manifest, index or configuration. As `require`, and FAILED_PRECONDITION where they come to too much."""
        self.require(descriptor)
        self._read += descriptor.size
        if descriptor.size > media.MAX_MANIFEST_BYTES or self._read > MAX_DOCUMENTS_BYTES:
            raise FailedPrecondition(f"{self._purpose}: {descriptor.digest} is too large for what it should be")
        return self._source.open(descriptor.digest)
