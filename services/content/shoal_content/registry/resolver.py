"""What a pull needs of a registry, whatever it speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shoal_bus.errors import Unavailable
from shoal_bus.types import Descriptor

from shoal_content.reference import Reference


class Interrupted(Unavailable):
    """The bytes broke off before their end: whoever reads them may ask for the rest."""


@dataclass(frozen=True)
class Body:
    """A blob's bytes as they come: the first of them is the blob's `offset`th, which may be before what was asked."""

    offset: int
    chunks: AsyncIterator[bytes]


class Resolver(ABC):
    """Finds images by reference, and reads what they are made of.

        async with HttpResolver(reference) as resolver:
            target, data = await resolver.resolve(reference)        # an index, or a manifest
            manifest = await resolver.manifest(reference, chosen)
            async with resolver.blob(reference, layer, offset) as body:
                async for chunk in body.chunks: ...

    A resolver lives for one pull. It verifies the digests of manifests; a blob's, and its size, are its reader's to
    verify, since he sees all of it. Its methods may be called at once. They raise NOT_FOUND, UNAUTHENTICATED,
    PERMISSION_DENIED, DATA_LOSS (wrong digest), FAILED_PRECONDITION (not what it should be) and, after as many tries
    as make sense, UNAVAILABLE. Messages name the registry and never a credential.
    """

    @abstractmethod
    async def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """What a reference names right now: its descriptor, and its bytes (4 MiB at most)."""

    @abstractmethod
    async def manifest(self, reference: Reference, descriptor: Descriptor) -> bytes:
        """A manifest of the same repository, by digest."""

    @abstractmethod
    def blob(self, reference: Reference, descriptor: Descriptor, offset: int = 0) -> AbstractAsyncContextManager[Body]:
        """A blob from `offset` on. Leaving the block early lets go of the connection; Interrupted when it broke off."""

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
