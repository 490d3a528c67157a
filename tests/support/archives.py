"""Archives of images made by hand, and the way they take to a node and from it.

with given(node, archive) as name:
    await client.operate(content.IMAGE_IMPORT, content.ImportImages(archive=name))
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal_bus.api.content import ARCHIVES

from tests.support.images import Entry, Image, directory, file
from tests.support.node import TestNode


def tar(entries: Sequence[Entry], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """Entries as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


def layout(
    images: dict[str, Image], *, leave_out: Sequence[str] = (), more: Sequence[Entry] = (), **index: Any
) -> list[Entry]:
    """Images by their names (`org.opencontainers.image.ref.name`) as the members of an OCI layout."""
    blobs: dict[str, bytes] = {}
    manifests = []
    for name, image in images.items():
        for one in (*image.platforms, image):
            blobs |= {digest: data for digest, (_, data) in one.blobs.items()}
            blobs[one.digest] = one.manifest
        entry: dict[str, Any] = {"mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest)}
        if name:
            entry["annotations"] = {"org.opencontainers.image.ref.name": name}
        manifests.append(entry)
    document = {"schemaVersion": 2, "manifests": manifests} | index
    return [
        file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
        file("index.json", json.dumps(document).encode()),
        directory("blobs"),
        directory("blobs/sha256"),
        *(blob(data, digest) for digest, data in blobs.items() if digest not in leave_out),
        *more,
    ]


def blob(data: bytes, digest: str) -> Entry:
    """A blob under the name that a layout has for that digest."""
    return file(f"blobs/{digest.replace(':', '/')}", data)


def docker(images: dict[str, Image], *, links: Sequence[Entry] = (), **layers: list[str]) -> list[Entry]:
    """Images by their tags as `docker save` has written them since 1.10, `manifest.json` last."""
    entries: list[Entry] = []
    manifests = []
    for tag, image in images.items():
        config = json.loads(image.manifest)["config"]["digest"].removeprefix("sha256:")
        entries.append(file(f"{config}.json", json.dumps(image.config).encode()))
        names = []
        for digest in image.layers:
            name = f"{digest.removeprefix('sha256:')}/layer.tar"
            names.append(name)
            entries.append(file(name, image.blobs[digest][1]))
        manifests.append({"Config": f"{config}.json", "RepoTags": [tag], "Layers": layers.get("layers", names)})
    return [*entries, *links, file("manifest.json", json.dumps(manifests).encode())]


@contextmanager
def given(node: TestNode, archive: bytes | Path, *, fifo: bool = False) -> Iterator[str]:
    """An archive where the node takes it from; through a FIFO, it is written as fast as it is read."""
    places = node.state / ARCHIVES
    places.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"test-{secrets.token_hex(4)}"
    place = places / name
    source = archive
    if isinstance(source, bytes):
        source = node.directory / f"{name}.tar"
        source.write_bytes(archive)  # type: ignore[arg-type]
    if not fifo:
        place.symlink_to(source)
        try:
            yield name
        finally:
            place.unlink()
        return
    os.mkfifo(place, 0o600)
    feeding = threading.Thread(target=feed, args=(source, place), daemon=True)
    feeding.start()
    try:
        yield name
    finally:
        fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK)  # whoever still waits for a reader
        os.close(fd)
        feeding.join(10)
        place.unlink()


def feed(source: Path, place: Path) -> None:
    """Writes a file to a FIFO, until nobody reads it any more."""
    try:
        with place.open("wb", buffering=0) as to:
            to.write(source.read_bytes())
    except BrokenPipeError:
        pass


@contextmanager
def taken(node: TestNode, path: Path) -> Iterator[str]:
    """Where the node puts an archive that is to become the file `path`."""
    places = node.state / ARCHIVES
    places.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"test-{secrets.token_hex(4)}"
    path.touch()
    (places / name).symlink_to(path)
    try:
        yield name
    finally:
        (places / name).unlink()
