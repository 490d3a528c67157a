"""What a pull brings besides the image that this node unpacks: other platforms, attestations, artifacts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from shoal_bus.errors import FailedPrecondition
from shoal_bus.image_reference import Reference
from shoal_bus.together import gather
from shoal_bus.types import Descriptor

from shoal_content import media
from shoal_content.registry.resolver import Resolver

_DEEPEST = 4


class Beyond:
    """Fetches manifests with all that they lead to. `keep` stores a manifest, `fetch` a blob; neither does so twice."""

    def __init__(
        self,
        resolver: Resolver,
        reference: Reference,
        keep: Callable[[Descriptor, bytes], Awaitable[None]],
        fetch: Callable[[Descriptor], Awaitable[object]],
    ) -> None:
        self._resolver, self._reference, self._keep, self._fetch = resolver, reference, keep, fetch
        self._seen: set[str] = set()

    def leave_out(self, manifest: Descriptor) -> None:
        """Somebody else fetches that one, with all that it leads to."""
        self._seen.add(manifest.digest)

    async def manifests(self, entries: Iterable[Descriptor], depth: int = 0, *, layers: bool = True) -> None:
        """An index's entries, and what is in indexes among them; without `layers`, their configurations alone."""
        for entry in entries:
            if entry.digest in self._seen:
                continue
            self._seen.add(entry.digest)
            if depth == _DEEPEST or len(self._seen) > media.MAX_MANIFESTS:
                raise FailedPrecondition(f"{self._reference}: too many indexes and manifests in one another")
            data = await self._resolver.manifest(self._reference, entry)
            await self._keep(entry, data)
            if media.kind_of(data, entry.media_type) in media.INDEXES:
                await self.manifests(media.read_entries(data), depth + 1, layers=layers)
            else:
                await self.blobs_of(data, layers=layers)

    async def blobs_of(self, manifest: bytes, *, layers: bool = True) -> None:
        """A manifest's configuration and layers, side by side."""
        parts = media.parts(manifest)
        children = {one.digest: one for one in (parts if layers else parts[:1])}
        await gather(*(self._fetched(one) for one in children.values()))

    async def _fetched(self, blob: Descriptor) -> None:
        await self._fetch(blob)
