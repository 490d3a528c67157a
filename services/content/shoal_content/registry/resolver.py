"""What pulls and pushes need of a registry, whatever it speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shoal_bus.errors import Unavailable
from shoal_bus.image_reference import Reference
from shoal_bus.types import Descriptor

Source = Callable[[int], AsyncGenerator[bytes, None]]
"""A blob to be uploaded: its bytes from an offset to its end, each time it is called."""


class Interrupted(Unavailable):
    """The bytes broke off before their end: whoever reads or sends them may go on with the rest."""


@dataclass(frozen=True)
class Body:
    """A blob's bytes as they come: the first of them is the blob's `offset`th, which may be before what was asked."""

    offset: int
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True)
class Referrer:
    """A manifest that has another one for its `subject` (OCI image-spec), as a signature has the image it is of."""

    descriptor: Descriptor
    artifact_type: str


class Resolver(ABC):
    """Finds images by reference, reads what they are made of, and takes new ones.

        async with HttpResolver(reference) as resolver:
            target, data = await resolver.resolve(reference)        # an index, or a manifest
            manifest = await resolver.manifest(reference, chosen)
            async with resolver.blob(reference, layer, offset) as body:
                async for chunk in body.chunks: ...

        async with HttpResolver(reference, push=True) as resolver:  # blobs first, what names them afterwards
            if not await resolver.exists(reference, layer) and not await resolver.mount(reference, layer, "team/base"):
                await resolver.upload(reference, layer, source)
            await resolver.put_manifest(reference, manifest, data)
            await resolver.put_manifest(reference, index, data, tag="latest")

    A resolver lives for one pull, or one push. It verifies the digests of manifests; a blob's, and its size, are its
    reader's to verify, since he sees all of it, and the registry's of one that is uploaded. Its methods may be called
    at once. They raise NOT_FOUND, UNAUTHENTICATED, PERMISSION_DENIED, DATA_LOSS (wrong digest), FAILED_PRECONDITION
    (not what it should be) and, after as many tries as make sense, UNAVAILABLE. Messages name the registry and never a
    credential.
    """

    # ----------------------------------------------------------------------------------------------------------- read

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
    async def referrers(self, reference: Reference, digest: str, artifact_type: str = "") -> list[Referrer]:
        """The manifests of the repository that refer to `digest`, of one type or of all; none is no error."""

    # ---------------------------------------------------------------------------------------------------------- write

    @abstractmethod
    async def exists(self, reference: Reference, descriptor: Descriptor, *, manifest: bool = False) -> bool:
        """Whether the repository has a blob, or a manifest, already."""

    @abstractmethod
    async def mount(self, reference: Reference, descriptor: Descriptor, repository: str) -> bool:
        """Has the repository share a blob with another one of the registry, if that may be; says whether it does."""

    @abstractmethod
    async def upload(
        self,
        reference: Reference,
        descriptor: Descriptor,
        source: Source,
        report: Callable[[int], None] = lambda sent: None,
    ) -> None:
        """Uploads a blob, and tells `report` how many of its bytes the registry has been sent.

        What breaks off goes on where the registry has it, or begins again. DATA_LOSS when the registry got other bytes
        than the digest's. An upload that fails or is cancelled is taken back where the registry can.
        """

    @abstractmethod
    async def put_manifest(self, reference: Reference, descriptor: Descriptor, data: bytes, tag: str = "") -> None:
        """Stores a manifest under its digest, and under a tag if one is given.

        One that has a `subject` is one of its referrers from then on.
        """

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
