"""A small image from busybox-static, and its push: OCI image-spec and distribution-spec, with the standard library."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import platform
import shutil
import tarfile
from pathlib import Path
from typing import Any

_APPLETS = ("cat", "echo", "env", "hostname", "id", "ls", "ps", "sh", "sleep", "uname")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_OCI = "application/vnd.oci.image"


def push(registry: str, repository: str, tag: str) -> None:
    """Pushes the image `<registry>/<repository>:<tag>` over plain HTTP; `registry` is host:port."""
    connection = http.client.HTTPConnection(registry, timeout=30)
    layer = _layer()
    blob = gzip.compress(layer, mtime=0)
    config = _json(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": _descriptor(f"{_OCI}.config.v1+json", config),
            "layers": [_descriptor(f"{_OCI}.layer.v1.tar+gzip", blob)],
        }
    )
    for data in (blob, config):
        _upload(connection, repository, data)
    headers = {"Content-Type": f"{_OCI}.manifest.v1+json"}
    _ask(connection, "PUT", f"/v2/{repository}/manifests/{tag}", manifest, headers, expected=201)
    connection.close()


def _layer() -> bytes:
    """A tar of /bin with busybox and a link for each applet, and /etc, /tmp, /proc, /sys, /dev."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("demo: busybox isn't there: apt-get install busybox-static")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        _file(tar, "bin/busybox", Path(busybox).read_bytes(), 0o755)
        _file(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
        for name in _APPLETS:
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return out.getvalue()


def _file(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _upload(connection: http.client.HTTPConnection, repository: str, data: bytes) -> None:
    location = _ask(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", {}, expected=202)
    headers = {"Content-Type": "application/octet-stream"}
    joint = "&" if "?" in location else "?"
    _ask(connection, "PUT", f"{location}{joint}digest={_digest(data)}", data, headers, expected=201)


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    *,
    expected: int,
) -> str:
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    text = reply.read()
    if reply.status != expected:
        raise SystemExit(f"demo: {method} {path}: the registry says {reply.status} {text[:200]!r}")
    return reply.getheader("Location", "")


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
