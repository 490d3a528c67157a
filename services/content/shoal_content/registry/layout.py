"""A directory in the OCI image layout (image-spec, image-layout.md) as a registry of one repository.

Its `index.json` names what has a tag (`org.opencontainers.image.ref.name`); a manifest without one is named there by
its digest alone. Whoever writes to it holds a lock of the directory; who reads sees whole files.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound
from shoal_bus.image_reference import Reference
from shoal_bus.types import Descriptor, check_digest

from shoal_content import media
from shoal_content.blobs.layout import digest_of, sync
from shoal_content.registry import referrers
from shoal_content.registry.resolver import Body, Interrupted, Referrer, Resolver, Source

TAG = "org.opencontainers.image.ref.name"
_CHUNK = 1 << 20
_MAX_INDEX_BYTES = 32 << 20


class LayoutResolver(Resolver):
    """The images of one directory, whichever registry and repository a reference names. With `push`, it is made."""

    def __init__(self, directory: Path, *, push: bool = False) -> None:
        self._directory, self._push = directory, push

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._prepare)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    # ----------------------------------------------------------------------------------------------------------- read

    async def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """What the index names, or what lies there under the reference's digest."""
        return await asyncio.to_thread(self._resolve, reference)

    async def manifest(self, reference: Reference, descriptor: Descriptor) -> bytes:
        """A manifest by digest."""
        return await asyncio.to_thread(self._manifest, reference, descriptor)

    @asynccontextmanager
    async def blob(self, reference: Reference, descriptor: Descriptor, offset: int = 0) -> AsyncIterator[Body]:
        """A blob from `offset` on."""
        try:
            fd = os.open(self._path(descriptor.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._missing(reference, descriptor.digest) from None
        try:
            if offset > os.fstat(fd).st_size:
                raise Interrupted(f"{self._directory} has no more of {descriptor.digest} than {offset} bytes")
            async with aclosing(_chunks(fd, offset)) as chunks:
                yield Body(offset, chunks)
        finally:
            os.close(fd)

    async def referrers(self, reference: Reference, digest: str, artifact_type: str = "") -> list[Referrer]:
        """Those of the manifests that the index names."""
        found = await asyncio.to_thread(self._referrers, reference, digest)
        return [one for one in found if not artifact_type or one.artifact_type == artifact_type]

    # ---------------------------------------------------------------------------------------------------------- write

    async def exists(self, reference: Reference, descriptor: Descriptor, *, manifest: bool = False) -> bool:
        """Whether its file is there."""
        return self._path(descriptor.digest).is_file()

    async def mount(self, reference: Reference, descriptor: Descriptor, repository: str) -> bool:
        """There is one repository: what is there is shared already."""
        return await self.exists(reference, descriptor)

    async def upload(
        self,
        reference: Reference,
        descriptor: Descriptor,
        source: Source,
        report: Callable[[int], None] = lambda sent: None,
    ) -> None:
        """Written beside its place, verified, synced, renamed."""
        path = self._path(descriptor.digest)
        hashed, size = hashlib.new(descriptor.digest.partition(":")[0]), 0
        with _beside(path) as (fd, file):
            async with aclosing(source(0)) as chunks:
                async for chunk in chunks:
                    hashed.update(chunk)
                    size += len(chunk)
                    await asyncio.to_thread(_write_all, fd, chunk)
                    report(size)
            if size != descriptor.size or f"{hashed.name}:{hashed.hexdigest()}" != descriptor.digest:
                raise DataLoss(f"{self._directory}: got other bytes than those of {descriptor.digest}")
            await asyncio.to_thread(_keep, fd, file, path)

    async def put_manifest(self, reference: Reference, descriptor: Descriptor, data: bytes, tag: str = "") -> None:
        """Stores a manifest, and names it in the index."""
        await asyncio.to_thread(self._put_manifest, descriptor, data, tag)

    # --------------------------------------------------------------------------------------------------------- within

    def _prepare(self) -> None:
        marker = self._directory / "oci-layout"
        if self._push and not marker.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            _replace(marker, json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        try:
            version = json.loads(marker.read_bytes()[:4096])["imageLayoutVersion"]
        except (OSError, ValueError, LookupError, TypeError):
            raise FailedPrecondition(f"{self._directory}: is no OCI image layout") from None
        if version != "1.0.0":
            raise FailedPrecondition(f"{self._directory}: is an OCI image layout of version {str(version)[:20]!r}")

    def _path(self, digest: str) -> Path:
        algorithm, _, encoded = check_digest(digest).partition(":")
        return self._directory / "blobs" / algorithm / encoded

    def _missing(self, reference: Reference, what: str) -> NotFound:
        return NotFound(f"{reference}: {what} isn't in {self._directory}")

    def _entries(self) -> list[dict[str, Any]]:
        try:
            with (self._directory / "index.json").open("rb") as file:
                data = file.read(_MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            return []
        if len(data) > _MAX_INDEX_BYTES:
            raise FailedPrecondition(f"{self._directory}: its index has more than {_MAX_INDEX_BYTES} bytes")
        return media.entries(data)

    def _resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        if reference.digest:
            data = self._small(reference, reference.digest)
            if digest_of(data, reference.digest.partition(":")[0]) != reference.digest:
                raise DataLoss(f"{reference}: {self._directory} has other bytes under that digest")
            return Descriptor(media_type=media.kind_of(data, ""), digest=reference.digest, size=len(data)), data
        for entry in self._entries():
            if (entry.get("annotations") or {}).get(TAG) == reference.tag:
                descriptor = media.descriptor(entry)
                data = self._manifest(reference, descriptor)
                kind = media.kind_of(data, descriptor.media_type)
                return Descriptor(media_type=kind, digest=descriptor.digest, size=len(data)), data
        raise self._missing(reference, f"tag {reference.tag}")

    def _manifest(self, reference: Reference, descriptor: Descriptor) -> bytes:
        data = self._small(reference, descriptor.digest)
        digest = digest_of(data, descriptor.digest.partition(":")[0])
        if digest != descriptor.digest or len(data) != descriptor.size:
            raise DataLoss(
                f"{reference}: {self._directory} has {len(data)} bytes of digest {digest} for manifest"
                f" {descriptor.digest} of {descriptor.size} bytes"
            )
        return data

    def _small(self, reference: Reference, digest: str) -> bytes:
        try:
            fd = os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._missing(reference, digest) from None
        with os.fdopen(fd, "rb") as file:
            data = file.read(media.MAX_MANIFEST_BYTES + 1)
        if len(data) > media.MAX_MANIFEST_BYTES:
            raise FailedPrecondition(f"{reference}: its manifest has more than {media.MAX_MANIFEST_BYTES} bytes")
        return data

    def _referrers(self, reference: Reference, digest: str) -> list[Referrer]:
        found: dict[str, Referrer] = {}
        for entry in self._entries():
            descriptor = media.descriptor(entry)
            try:
                data = self._small(reference, descriptor.digest)
            except NotFound:
                continue
            if referrers.subject_of(data) == digest:
                found[descriptor.digest] = Referrer(
                    descriptor.model_copy(update={"annotations": referrers.annotations_of(data)}),
                    referrers.artifact_type_of(data),
                )
        return list(found.values())

    def _put_manifest(self, descriptor: Descriptor, data: bytes, tag: str) -> None:
        if digest_of(data, descriptor.digest.partition(":")[0]) != descriptor.digest:
            raise DataLoss(f"{self._directory}: got other bytes than those of {descriptor.digest}")
        path = self._path(descriptor.digest)
        with _beside(path) as (fd, file):
            _write_all(fd, data)
            _keep(fd, file, path)
        with self._locked():
            entries = self._entries()
            named = [one for one in entries if (one.get("annotations") or {}).get(TAG) != tag or not tag]
            if tag or not any(one.get("digest") == descriptor.digest for one in named):
                entry: dict[str, Any] = {
                    "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size,
                }  # fmt: skip
                if tag:
                    named = [
                        one for one in named
                        if one.get("digest") != descriptor.digest or (one.get("annotations") or {}).get(TAG)
                    ]  # fmt: skip
                    entry["annotations"] = {TAG: tag}
                named.append(entry)
            index = {"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": named}
            _replace(self._directory / "index.json", json.dumps(index).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


async def _chunks(fd: int, offset: int) -> AsyncGenerator[bytes, None]:
    while data := await asyncio.to_thread(os.pread, fd, _CHUNK, offset):
        yield data
        offset += len(data)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[int, Path]]:
    """A file to be written beside its place; gone at the end of the block unless it was kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        yield fd, Path(name)
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            Path(name).unlink()


def _keep(fd: int, file: Path, path: Path) -> None:
    os.fchmod(fd, 0o644)
    os.fsync(fd)
    file.rename(path)
    sync(path.parent)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _replace(path: Path, data: bytes) -> None:
    with _beside(path) as (fd, file):
        _write_all(fd, data)
        _keep(fd, file, path)
