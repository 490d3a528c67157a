"""What every `Resolver` must do: a class of tests that each implementation's own tests inherit.

class TestLayout(ResolverSuite):
    @pytest.fixture
    def opened(self, tmp_path): return lambda: LayoutResolver(tmp_path / "layout", push=True)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from shoal_bus.errors import DataLoss, FailedPrecondition, NotFound
from shoal_bus.image_reference import Reference
from shoal_bus.types import Descriptor
from shoal_content.registry.resolver import Interrupted, Resolver, Source

from tests.support.images import Image, Layer, file

DATA = random.Random(20261125).randbytes(700_001)


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def descriptor_of(data: bytes, media_type: str = "application/octet-stream", algorithm: str = "sha256") -> Descriptor:
    return Descriptor(media_type=media_type, digest=digest_of(data, algorithm), size=len(data))


def source_of(data: bytes, *, asked: list[int] | None = None, piece: int = 50_000) -> Source:
    """`data` as a source; `asked` learns from where it was read."""

    async def source(offset: int) -> AsyncGenerator[bytes, None]:
        if asked is not None:
            asked.append(offset)
        for at in range(offset, len(data), piece):
            yield data[at : at + piece]

    return source


def artifact(subject: Descriptor | None, kind: str, note: str = "") -> bytes:
    """A manifest of an artifact that refers to another one."""
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
    made: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": kind,
        "config": empty, "layers": [empty], "annotations": {"note": note},
    }  # fmt: skip
    if subject is not None:
        made["subject"] = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
    return json.dumps(made).encode()


async def read(resolver: Resolver, reference: Reference, descriptor: Descriptor, offset: int = 0) -> bytes:
    """A blob from `offset` on, whatever more the registry sends before it."""
    async with resolver.blob(reference, descriptor, offset) as body:
        data = b"".join([chunk async for chunk in body.chunks])
    return data[offset - body.offset :]


async def push(resolver: Resolver, reference: Reference, image: Image, tag: str) -> Descriptor:
    """All of an image, by the interface."""
    for one in image.platforms:
        await push(resolver, reference, one, "")
    for media_type, data in image.blobs.values():
        await resolver.upload(reference, descriptor_of(data, media_type), source_of(data))
    target = descriptor_of(image.manifest, image.media_type)
    await resolver.put_manifest(reference, target, image.manifest, tag)
    return target


class ResolverSuite:
    """The contract, test by test. `opened` makes a resolver that may push, each time of the same empty repository."""

    reference = Reference("registry.example", "team/app", "v1")

    @pytest.fixture
    def opened(self) -> Callable[[], Resolver]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ manifests

    @pytest.mark.parametrize("flavour", ["oci", "docker"])
    async def test_what_was_pushed_resolves_by_tag_and_by_digest(
        self, opened: Callable[[], Resolver], flavour: Any
    ) -> None:
        image = Image.build([Layer([file("a", b"a" * 5000)], "zstd"), Layer([file("b")], "none")], flavour=flavour)
        async with opened() as resolver:
            target = await push(resolver, self.reference, image, "v1")
        async with opened() as resolver:
            for selector in {"tag": "v1"}, {"digest": target.digest}, {"tag": "v1", "digest": target.digest}:
                named = Reference(self.reference.domain, self.reference.path, **selector)
                found, data = await resolver.resolve(named)
                assert (found.digest, found.size, found.media_type) == (target.digest, target.size, target.media_type)
                assert data == image.manifest
            assert await resolver.manifest(self.reference, target) == image.manifest
            for media_type, data in image.blobs.values():
                assert await read(resolver, self.reference, descriptor_of(data, media_type)) == data

    async def test_index_comes_after_its_manifests_and_resolves(self, opened: Callable[[], Resolver]) -> None:
        images = [Image.build([Layer([file("arch", name.encode())])], architecture=name) for name in ("amd64", "arm64")]
        index = Image.index(images)
        async with opened() as resolver:
            await push(resolver, self.reference, index, "v1")
            found, data = await resolver.resolve(self.reference)
            assert (found.digest, data) == (index.digest, index.manifest)
            for one in images:
                assert await resolver.manifest(self.reference, descriptor_of(one.manifest, one.media_type))

    async def test_tag_moves_and_what_it_named_stays(self, opened: Callable[[], Resolver]) -> None:
        old, new = (Image.build([Layer([file("f", name)])]) for name in (b"old", b"new"))
        async with opened() as resolver:
            was = await push(resolver, self.reference, old, "v1")
            await push(resolver, self.reference, new, "v1")
            found, _ = await resolver.resolve(self.reference)
            assert found.digest == new.digest
            assert await resolver.manifest(self.reference, was) == old.manifest

    async def test_what_isnt_there_is_not_found(self, opened: Callable[[], Resolver]) -> None:
        missing = descriptor_of(b"nowhere")
        async with opened() as resolver:
            with pytest.raises(NotFound):
                await resolver.resolve(self.reference)
            with pytest.raises(NotFound):
                await resolver.resolve(Reference(self.reference.domain, self.reference.path, digest=missing.digest))
            with pytest.raises(NotFound):
                await resolver.manifest(self.reference, missing)
            with pytest.raises(NotFound):
                async with resolver.blob(self.reference, missing):
                    pass
            assert not await resolver.exists(self.reference, missing)
            assert not await resolver.exists(self.reference, missing, manifest=True)
            assert not await resolver.mount(self.reference, missing, "team/other")
            assert await resolver.referrers(self.reference, missing.digest) == []

    async def test_manifest_of_another_size_is_data_loss(self, opened: Callable[[], Resolver]) -> None:
        image = Image.build([Layer([file("f")])])
        async with opened() as resolver:
            target = await push(resolver, self.reference, image, "v1")
            with pytest.raises(DataLoss):
                await resolver.manifest(self.reference, target.model_copy(update={"size": target.size - 1}))

    async def test_manifest_put_under_a_wrong_digest_is_refused(self, opened: Callable[[], Resolver]) -> None:
        image = Image.build([Layer([file("f")])])
        async with opened() as resolver:
            await push(resolver, self.reference, image, "v1")
            with pytest.raises((DataLoss, FailedPrecondition)):
                await resolver.put_manifest(self.reference, descriptor_of(b"other"), image.manifest)

    # ---------------------------------------------------------------------------------------------------------- blobs

    async def test_blob_is_uploaded_once_and_read_from_any_offset(self, opened: Callable[[], Resolver]) -> None:
        blob, told = descriptor_of(DATA), list[int]()
        async with opened() as resolver:
            assert not await resolver.exists(self.reference, blob)
            await resolver.upload(self.reference, blob, source_of(DATA), told.append)
            assert await resolver.exists(self.reference, blob)
            assert told[-1] == len(DATA)
            assert told == sorted(told)
            for offset in (0, 1, 65536, len(DATA) - 1):
                assert await read(resolver, self.reference, blob, offset) == DATA[offset:]

    async def test_reading_beyond_the_end_is_interrupted(self, opened: Callable[[], Resolver]) -> None:
        blob = descriptor_of(DATA)
        async with opened() as resolver:
            await resolver.upload(self.reference, blob, source_of(DATA))
            with pytest.raises(Interrupted):
                await read(resolver, self.reference, blob, len(DATA) + 1)

    @pytest.mark.parametrize("data", [b"", b"x"])
    async def test_smallest_blobs_are_uploaded(self, opened: Callable[[], Resolver], data: bytes) -> None:
        blob = descriptor_of(data)
        async with opened() as resolver:
            await resolver.upload(self.reference, blob, source_of(data))
            assert await read(resolver, self.reference, blob) == data

    async def test_sha512_is_a_digest_too(self, opened: Callable[[], Resolver]) -> None:
        blob = descriptor_of(DATA, algorithm="sha512")
        async with opened() as resolver:
            await resolver.upload(self.reference, blob, source_of(DATA))
            assert await read(resolver, self.reference, blob) == DATA

    @pytest.mark.parametrize("sent", [DATA[:-1], DATA[:-1] + b"?", b""], ids=["short", "wrong", "nothing"])
    async def test_other_bytes_than_the_digests_are_data_loss_and_not_kept(
        self, opened: Callable[[], Resolver], sent: bytes
    ) -> None:
        blob = descriptor_of(DATA)
        async with opened() as resolver:
            with pytest.raises(DataLoss):
                await resolver.upload(self.reference, blob, source_of(sent))
            assert not await resolver.exists(self.reference, blob)
            await resolver.upload(self.reference, blob, source_of(DATA))
            assert await read(resolver, self.reference, blob) == DATA

    async def test_source_that_fails_fails_the_upload_with_its_own_error(self, opened: Callable[[], Resolver]) -> None:
        async def source(offset: int) -> AsyncGenerator[bytes, None]:
            yield DATA[offset : offset + 1000]
            raise PermissionError(13, "no right to read it")

        async with opened() as resolver:
            with pytest.raises(PermissionError):
                await resolver.upload(self.reference, descriptor_of(DATA), source)
            assert not await resolver.exists(self.reference, descriptor_of(DATA))

    async def test_cancelled_upload_leaves_nothing_and_can_be_repeated(self, opened: Callable[[], Resolver]) -> None:
        reached = asyncio.Event()

        async def source(offset: int) -> AsyncGenerator[bytes, None]:
            yield DATA[:1000]
            reached.set()
            await asyncio.sleep(60)

        blob = descriptor_of(DATA)
        async with opened() as resolver:
            uploading = asyncio.create_task(resolver.upload(self.reference, blob, source))
            await asyncio.wait_for(reached.wait(), 20)
            uploading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await uploading
            assert not await resolver.exists(self.reference, blob)
            await resolver.upload(self.reference, blob, source_of(DATA))
            assert await resolver.exists(self.reference, blob)

    async def test_many_at_once(self, opened: Callable[[], Resolver]) -> None:
        blobs = [bytes([n]) * 30_000 for n in range(12)]
        async with opened() as resolver:
            await asyncio.gather(
                *(resolver.upload(self.reference, descriptor_of(one), source_of(one)) for one in blobs)
            )
            found = await asyncio.gather(*(read(resolver, self.reference, descriptor_of(one)) for one in blobs))
        assert found == blobs

    # ------------------------------------------------------------------------------------------------------ referrers

    async def test_referrers_are_listed_by_type(self, opened: Callable[[], Resolver]) -> None:
        image = Image.build([Layer([file("f")])])
        async with opened() as resolver:
            target = await push(resolver, self.reference, image, "v1")
            assert await resolver.referrers(self.reference, target.digest) == []
            await resolver.upload(self.reference, descriptor_of(b"{}"), source_of(b"{}"))
            made = {}
            for kind in ("application/vnd.example.sbom", "application/vnd.example.signature"):
                data = artifact(target, kind, note=kind)
                made[kind] = descriptor_of(data, "application/vnd.oci.image.manifest.v1+json")
                for _ in range(2):  # again is no second one
                    await resolver.put_manifest(self.reference, made[kind], data)
            other = artifact(None, "application/vnd.example.other")
            await resolver.put_manifest(
                self.reference, descriptor_of(other, "application/vnd.oci.image.manifest.v1+json"), other
            )
        async with opened() as resolver:
            found = {
                one.artifact_type: one.descriptor for one in await resolver.referrers(self.reference, target.digest)
            }
            assert {kind: one.digest for kind, one in found.items()} == {kind: one.digest for kind, one in made.items()}
            assert found["application/vnd.example.sbom"].annotations == {"note": "application/vnd.example.sbom"}
            only = await resolver.referrers(self.reference, target.digest, "application/vnd.example.sbom")
            assert [one.descriptor.digest for one in only] == [made["application/vnd.example.sbom"].digest]
