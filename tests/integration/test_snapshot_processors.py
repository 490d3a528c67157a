"""Layers that a program decompresses, by their media types: containerd's stream processors."""

from __future__ import annotations

import asyncio
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from shoal_bus.api import content
from shoal_bus.api import snapshot as api
from shoal_bus.client import Client
from shoal_bus.connection import Connection
from shoal_bus.errors import DataLoss, FailedPrecondition, ShoalError
from shoal_bus.types import Descriptor
from shoal_snapshot.processors import load

from tests.support.images import Image, Layer, digest_of, file, push
from tests.support.natsd import NatsServer
from tests.support.node import TestNode
from tests.support.registry import running

XZ, SLOW, NONE, BAD = (f"application/vnd.oci.image.layer.v1.tar+{name}" for name in ("xz", "slow", "none", "bad"))
TURNED_XZ, TURNED_GZIP, FAILING = (
    f"application/vnd.oci.image.layer.v1.tar+{name}" for name in ("xz+turned", "gzip+turned", "failing")
)
TURN, TURN_BACK = r"\\000-\\377", r"\\001-\\377\\000"
CONFIGURATION = f"""
[stream_processors."xz"]
accepts = ["{XZ}"]
returns = "application/vnd.oci.image.layer.v1.tar"
path = "sh"
args = ["-c", "exec xz -dc $FLAGS"]
env = ["FLAGS=--memlimit=64MiB"]
[stream_processors."turned"]
accepts = ["{TURNED_XZ}"]
returns = "{XZ}"
path = "tr"
args = ["{TURN}", "{TURN_BACK}"]
env = ["LC_ALL=C"]
[stream_processors."turned and gzip"]
accepts = ["{TURNED_GZIP}"]
returns = "application/vnd.oci.image.layer.v1.tar+gzip"
path = "sh"
args = ["-c", "test $STREAM_PROCESSOR_MEDIATYPE = {TURNED_GZIP} || exit 9; exec tr '{TURN}' '{TURN_BACK}'"]
env = ["LC_ALL=C"]
[stream_processors."failing"]
accepts = ["{FAILING}"]
returns = "{XZ}"
path = "sh"
args = ["-c", "echo the key   is missing >&2; exit 3"]
[stream_processors."slow"]
accepts = ["{SLOW}"]
returns = "application/vnd.oci.image.layer.v1.tar"
path = "sleep"
args = ["1000"]
[stream_processors."nothing"]
accepts = ["{NONE}"]
returns = "application/vnd.oci.image.layer.v1.tar"
path = "/nothing/there"
"""


@pytest.fixture
def node(natsd: NatsServer, tmp_path: Path) -> Iterator[TestNode]:
    (tmp_path / "processors.toml").write_text(CONFIGURATION)
    with TestNode(tmp_path, natsd) as started:
        started.start("snapshot", arguments=("--stream-processors", str(tmp_path / "processors.toml")))
        yield started


async def test_a_program_decompresses_a_layer(node: TestNode, connection: Connection) -> None:
    client = Client(connection, node.name)
    tar = Layer([file(f"f{number}", os.urandom(30_000)) for number in range(100)]).tar()
    data = lzma.compress(tar)

    async def unpack(name: str, media_type: str, data: bytes) -> api.SnapshotInfo:
        path = node.root / "content" / "claims" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        blob = Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))
        request = api.UnpackLayer(name=name, descriptor=blob, path=str(path), diff_id=digest_of(tar))
        return await client.operate(api.SNAPSHOT_UNPACK, request, timeout=30)

    assert (await unpack("one", XZ, data)).kind == "committed"
    assert len(list((node.root / "snapshot" / "overlayfs").glob("snapshots/*/fs/f*"))) == 100
    # What one returns is another one's to read, or compressed as layers are.
    turned = bytes((one - 1) % 256 for one in range(256))
    assert (await unpack("chain", TURNED_XZ, data.translate(turned))).kind == "committed"
    assert (await unpack("then gzip", TURNED_GZIP, gzip.compress(tar).translate(turned))).kind == "committed"
    with pytest.raises(DataLoss, match="sh ended with status 3: the key is missing"):
        await unpack("failing", FAILING, data)
    for name, media_type, wrong, error in (
        ("cut", XZ, data[: len(data) // 2], DataLoss),
        ("garbage", XZ, b"garbage" * 100_000, DataLoss),
        ("nothing", NONE, data, FailedPrecondition),
        ("unknown", BAD, data, FailedPrecondition),
    ):
        with pytest.raises(error) as raised:
            await unpack(name, media_type, wrong)
        assert isinstance(raised.value, ShoalError)
    assert len(await client.collect(api.SNAPSHOT_LIST, api.ListSnapshots())) == 3
    # One that never comes to an end goes with whoever wanted it.
    slow = asyncio.create_task(unpack("slow", SLOW, data))
    async with asyncio.timeout(20):
        service = psutil.Process(node.of("snapshot").pid)
        while not (programs := [one for one in service.children(recursive=True) if one.name() == "sleep"]):
            await asyncio.sleep(0.05)
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    assert (await asyncio.to_thread(psutil.wait_procs, programs, 10))[1] == []


async def test_an_image_of_such_layers_is_pulled(node: TestNode, connection: Connection, tmp_path: Path) -> None:
    node.start("content")
    client = Client(connection, node.name)
    with running(tmp_path / "registry") as registry:
        for media_type, known in ((XZ, True), (BAD, False)):
            tar = Layer([file("f", media_type.encode())]).tar()
            data = lzma.compress(tar)
            image = Image.build([Layer([file("f", media_type.encode())], "none")])
            manifest = json.loads(image.manifest)
            manifest["layers"] = [{"mediaType": media_type, "digest": digest_of(data), "size": len(data)}]
            image.blobs[digest_of(data)] = media_type, data
            image.manifest = json.dumps(manifest).encode()
            name = push(image, registry.host, "other")
            pulling = client.operate(content.IMAGE_PULL, content.PullImage(name=name), timeout=60)
            if known:
                assert (await pulling).target.digest == image.digest
                await client.call(content.IMAGE_DELETE, content.ImageRequest(name=name))
                continue
            with pytest.raises(FailedPrecondition, match="can't be read"):
                await pulling
    assert await client.collect(content.BLOB_LIST, content.ListBlobs()) == []


def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path / "nothing") == {}
    path = tmp_path / "processors.toml"
    twice = CONFIGURATION + CONFIGURATION.replace('."', '."again-')
    circle = CONFIGURATION + '[stream_processors.c]\naccepts = ["a"]\nreturns = "a"\npath = "x"\n'
    nowhere = CONFIGURATION + '[stream_processors.c]\naccepts = ["a"]\nreturns = "b"\npath = "x"\n'
    for text in (
        "[",
        circle,
        nowhere,
        "[stream_processors.x]\npath = 'x'",
        CONFIGURATION.replace("path =", "paths ="),
        twice,
        "\xff",
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(FailedPrecondition, match=r"processors\.toml"):
            load(path)
    path.write_text(CONFIGURATION)
    assert load(path)[XZ].path == "sh"
