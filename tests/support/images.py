"""OCI images made in plain Python, from busybox-static or from lists of tar entries, and pushed to a registry.

image = busybox_image(cmd=["echo", "hello"])
push(image, "127.0.0.1:5000", "busybox", "latest")

layers = [Layer([directory("etc"), file("etc/motd", b"hi")], compression="zstd"), Layer([whiteout("etc/motd")])]
push(Image.build(layers), "127.0.0.1:5000", "layered")
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import zstandard

OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution.manifest"
_TYPES: dict[str, dict[str, str]] = {
    "oci": {
        "index": f"{OCI}.index.v1+json",
        "manifest": f"{OCI}.manifest.v1+json",
        "config": f"{OCI}.config.v1+json",
        "none": f"{OCI}.layer.v1.tar",
        "gzip": f"{OCI}.layer.v1.tar+gzip",
        "zstd": f"{OCI}.layer.v1.tar+zstd",
    },
    "docker": {
        "index": f"{DOCKER}.list.v2+json",
        "manifest": f"{DOCKER}.v2+json",
        "config": "application/vnd.docker.container.image.v1+json",
        "none": "application/vnd.docker.image.rootfs.diff.tar",
        "gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "zstd": "application/vnd.docker.image.rootfs.diff.tar.zstd",
    },
}
APPLETS = (
    "sh ash cat echo env false true hostname id ip ls mkdir mount ping ps pwd rm seq sleep stat stty tail test top "
    "touch uname wc wget nc kill date dd grep head ln mknod chmod chown sync trap cp mv df find sed od tty"
)

Entry = tuple[tarfile.TarInfo, bytes]
Flavour = Literal["oci", "docker"]
Blob = tuple[str, bytes]
"""A media type and what it is the type of."""


def digest_of(data: bytes) -> str:
    """`data`'s sha256 digest as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# -------------------------------------------------------------------------------------------------------------- entries


def entry(name: str, kind: bytes, mode: int, data: bytes = b"", **fields: Any) -> Entry:
    """Any tar entry; `fields` are those of `tarfile.TarInfo` (uid, gid, mtime, linkname, devmajor, pax_headers, …)."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def file(name: str, data: bytes = b"", mode: int = 0o644, **fields: Any) -> Entry:
    return entry(name, tarfile.REGTYPE, mode, data, **fields)


def directory(name: str, mode: int = 0o755, **fields: Any) -> Entry:
    return entry(name, tarfile.DIRTYPE, mode, **fields)


def symlink(name: str, target: str, **fields: Any) -> Entry:
    return entry(name, tarfile.SYMTYPE, 0o777, linkname=target, **fields)


def hardlink(name: str, target: str, **fields: Any) -> Entry:
    return entry(name, tarfile.LNKTYPE, 0o644, linkname=target, **fields)


def whiteout(path: str) -> Entry:
    """Removes `path` of the layers below (OCI image-spec, layer.md#whiteouts)."""
    parent, _, name = path.rpartition("/")
    return file(f"{parent}/.wh.{name}" if parent else f".wh.{name}")


def opaque(path: str) -> Entry:
    """Hides everything the layers below have in directory `path`."""
    return file(f"{path}/.wh..wh..opq")


# --------------------------------------------------------------------------------------------------------------- images


@dataclass
class Layer:
    """One layer: tar entries, and how they are compressed."""

    entries: Sequence[Entry]
    compression: Literal["none", "gzip", "zstd"] = "gzip"

    def tar(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for info, data in self.entries:
                tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        return buffer.getvalue()

    @staticmethod
    def compress(tar: bytes, compression: str) -> bytes:
        match compression:
            case "gzip":
                return gzip.compress(tar, 1, mtime=0)
            case "zstd":
                return zstandard.ZstdCompressor(3).compress(tar)
            case _:
                return tar


@dataclass
class Image:
    """An image of one platform, or (`platforms`) an index of several: the blobs it is made of, and its top."""

    media_type: str
    manifest: bytes
    blobs: dict[str, Blob] = field(default_factory=dict)
    """Configuration and layers by digest."""
    platforms: list[Image] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    """The layers' digests, bottom first."""
    diff_ids: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @classmethod
    def build(
        cls,
        layers: Sequence[Layer],
        *,
        config: dict[str, Any] | None = None,
        architecture: str = "amd64",
        os: str = "linux",
        variant: str = "",
        flavour: Flavour = "oci",
    ) -> Image:
        """An image of `layers`; `config` is what the image configuration has under `config` (Env, Cmd, User, …)."""
        types = _TYPES[flavour]
        blobs: dict[str, Blob] = {}
        descriptors, diff_ids = [], []
        for layer in layers:
            tar = layer.tar()
            data = Layer.compress(tar, layer.compression)
            descriptors.append(_descriptor(types[layer.compression], data))
            diff_ids.append(digest_of(tar))
            blobs[digest_of(data)] = types[layer.compression], data
        configuration: dict[str, Any] = {
            "architecture": architecture,
            "os": os,
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        if variant:
            configuration["variant"] = variant
        data = json.dumps(configuration).encode()
        blobs[digest_of(data)] = types["config"], data
        manifest = {
            "schemaVersion": 2,
            "mediaType": types["manifest"],
            "config": _descriptor(types["config"], data),
            "layers": descriptors,
        }
        return cls(
            types["manifest"], json.dumps(manifest).encode(), blobs,
            config=configuration, layers=[d["digest"] for d in descriptors], diff_ids=diff_ids,
        )  # fmt: skip

    @classmethod
    def index(cls, images: Sequence[Image], *, flavour: Flavour = "oci") -> Image:
        """One image of several platforms."""
        manifests = []
        for image in images:
            platform = {key: image.config[key] for key in ("architecture", "os", "variant") if key in image.config}
            manifests.append(_descriptor(image.media_type, image.manifest) | {"platform": platform})
        index = {"schemaVersion": 2, "mediaType": _TYPES[flavour]["index"], "manifests": manifests}
        return cls(_TYPES[flavour]["index"], json.dumps(index).encode(), platforms=list(images))


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def busybox_layer(*, compression: Literal["none", "gzip", "zstd"] = "gzip") -> Layer:
    """A root file system with busybox-static and links for its applets."""
    entries = [directory(name) for name in ("bin", "dev", "etc", "proc", "root", "sys", "var")]
    entries += [directory("tmp", 0o1777), file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:\n")]
    entries += [file("etc/group", b"root:x:0:\nuser:x:1000:\n")]
    entries.append(file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755))
    entries += [symlink(f"bin/{applet}", "busybox") for applet in APPLETS.split()]
    return Layer(entries, compression)


def busybox_image(cmd: Sequence[str] = ("/bin/sh",), *, flavour: Flavour = "oci", **config: Any) -> Image:
    """A small image that runs: busybox-static with `cmd`; further fields of the configuration by name."""
    config = {"Env": ["PATH=/bin"], "Cmd": list(cmd), **config}
    return Image.build([busybox_layer()], config=config, flavour=flavour)


# ----------------------------------------------------------------------------------------------------------------- push


def push(image: Image, host: str, repository: str, tag: str = "latest") -> str:
    """Pushes to the registry at `host` (plain HTTP) by the distribution spec; returns the reference it has there."""
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        for one in image.platforms:
            _push_one(connection, one, repository, one.digest)
        _push_one(connection, image, repository, tag)
    finally:
        connection.close()
    return f"{host}/{repository}:{tag}"


def _push_one(connection: http.client.HTTPConnection, image: Image, repository: str, reference: str) -> None:
    for digest, (_, data) in image.blobs.items():
        if _send(connection, "HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 200:
            continue
        status, headers = _send(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"")
        assert status == 202, f"the registry refused an upload: {status}"
        place = urlsplit(headers["location"])
        target = f"{place.path}?{place.query}&digest={digest}".replace("?&", "?")
        status, _ = _send(connection, "PUT", target, data, {"Content-Type": "application/octet-stream"})
        assert status == 201, f"the registry refused a blob: {status}"
    put = f"/v2/{repository}/manifests/{reference}"
    status, _ = _send(connection, "PUT", put, image.manifest, {"Content-Type": image.media_type})
    assert status == 201, f"the registry refused a manifest: {status}"


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str]]:
    connection.request(method, path, body=body, headers=headers or {})
    response = connection.getresponse()
    response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}
