"""OCI bundles for tests: a root file system of busybox-static, and a small specification."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal_bus.types import Mount

from tests.support.images import APPLETS


def busybox_rootfs(directory: Path) -> Path:
    """A root file system with busybox and links for its applets."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", directory / "bin/busybox")
    for applet in APPLETS.split():
        (directory / "bin" / applet).symlink_to("busybox")
    return directory


def bind(rootfs: Path) -> list[Mount]:
    """A `Mount` list that is just a directory."""
    return [Mount(type="bind", source=str(rootfs), options=["rbind", "rw"])]


def spec(args: Sequence[str], *, terminal: bool = False, **process: Any) -> dict[str, Any]:
    """A specification with namespaces of its own and a cgroup nobody else has."""
    kinds = ("pid", "ipc", "uts", "mount", "network")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal, "user": {"uid": 0, "gid": 0}, "args": list(args), "env": ["PATH=/bin"], "cwd": "/",
            **process,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], "cgroupsPath": f"/shoal-{secrets.token_hex(6)}"},
    }  # fmt: skip


def bundle(directory: Path, specification: dict[str, Any]) -> Path:
    """A bundle directory with its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(specification))
    return directory
