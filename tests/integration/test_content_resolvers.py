"""Every resolver passes the suite of the interface: a real registry, in one piece and in several, and a layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shoal_bus.errors import FailedPrecondition
from shoal_bus.image_reference import Reference
from shoal_content.registry.http import HttpResolver
from shoal_content.registry.layout import LayoutResolver
from shoal_content.registry.resolver import Resolver

from tests.support.images import Image, Layer, file
from tests.support.registry import Registry, running
from tests.support.resolver_suite import DATA, ResolverSuite, descriptor_of, push, read, source_of


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as started:
        yield started


class TestRegistry(ResolverSuite):
    @pytest.fixture
    def opened(self, registry: Registry, tmp_path: Path) -> Callable[[], Resolver]:
        self.reference = Reference(registry.host, "team/app", "v1")
        return lambda: HttpResolver(self.reference, push=True, directory=tmp_path)

    async def test_blob_of_another_repository_is_mounted(self, opened: Callable[[], Resolver]) -> None:
        blob = descriptor_of(DATA)
        elsewhere = Reference(self.reference.domain, "team/base", "v1")
        async with HttpResolver(elsewhere, push=True) as base:
            await base.upload(elsewhere, blob, source_of(DATA))
        async with opened() as resolver:
            assert not await resolver.exists(self.reference, blob)
            assert await resolver.mount(self.reference, blob, "team/base")
            assert await read(resolver, self.reference, blob) == DATA

    async def test_upload_goes_on_where_a_mount_was_refused(
        self, opened: Callable[[], Resolver], registry: Registry
    ) -> None:
        blob = descriptor_of(DATA)
        async with opened() as resolver:
            assert not await resolver.mount(self.reference, blob, "team/nothing")
            await resolver.upload(self.reference, blob, source_of(DATA))
            assert await resolver.exists(self.reference, blob)
        uploads = registry.directory / "data/docker/registry/v2/repositories/team/app/_uploads"
        assert list(uploads.glob("*/startedat")) == []


class TestRegistryInPieces(ResolverSuite):
    @pytest.fixture
    def opened(self, registry: Registry, tmp_path: Path) -> Callable[[], Resolver]:
        self.reference = Reference(registry.host, "team/app", "v1")
        return lambda: HttpResolver(self.reference, push=True, directory=tmp_path, piece=100_000)


class TestLayout(ResolverSuite):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Callable[[], Resolver]:
        return lambda: LayoutResolver(tmp_path / "layout", push=True)

    async def test_what_is_written_is_an_oci_image_layout(self, opened: Callable[[], Resolver], tmp_path: Path) -> None:
        image = Image.build([Layer([file("f")])])
        async with opened() as resolver:
            await push(resolver, self.reference, image, "v1")
        layout = tmp_path / "layout"
        assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        index = json.loads((layout / "index.json").read_text())
        assert [one["digest"] for one in index["manifests"]] == [image.digest]
        assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
        kept = {f"sha256:{path.name}" for path in (layout / "blobs/sha256").iterdir()}
        assert kept == {image.digest, *image.blobs}

    async def test_what_is_no_layout_is_refused(self, tmp_path: Path) -> None:
        for marker in (None, "", "[]", '{"imageLayoutVersion": "9"}'):
            if marker is not None:
                (tmp_path / "oci-layout").write_text(marker)
            with pytest.raises(FailedPrecondition, match=str(tmp_path)):
                async with LayoutResolver(tmp_path):
                    pass

    async def test_link_that_leads_out_of_the_layout_isnt_followed(
        self, opened: Callable[[], Resolver], tmp_path: Path
    ) -> None:
        blob = descriptor_of(b"secret")
        (tmp_path / "outside").write_bytes(b"secret")
        async with opened() as resolver:
            place = tmp_path / "layout/blobs/sha256" / blob.digest.partition(":")[2]
            place.parent.mkdir(parents=True)
            place.symlink_to(tmp_path / "outside")
            with pytest.raises(OSError, match="symbolic links"):
                await read(resolver, self.reference, blob)
