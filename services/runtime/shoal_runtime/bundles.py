"""Bundles: the directory an OCI runtime is given for each task (runtime-spec, bundle.md), below the state directory.

As with containerd, it also says in `shim-binary-path` which program runs the task, and `log` there takes lines for the
service's log: it is a link to the one FIFO of them all (`shim_log`).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal_bus.errors import Internal

from shoal_runtime import shim_log
from shoal_runtime.shim import mounts

CONFIG, ROOTFS = "config.json", "rootfs"
PROGRAM, LOG = "shim-binary-path", "log"
_LOG_FROM_HERE = f"../../../{shim_log.NAME}"


class Bundles:
    """Every bundle of the node: `<state>/runtime/bundles/<namespace>/<id>`, root's alone."""

    def __init__(self, state: Path) -> None:
        self._directory = state / "bundles"

    def path(self, namespace: str, id: str) -> Path:
        """Where a task's bundle is, or would be."""
        return self._directory / namespace / id

    def make(self, namespace: str, id: str, spec: dict[str, Any], program: str) -> Path:
        """Makes a task's bundle with `spec` as its `config.json`; one that is there already is written again.

        `program` is the path of the OCI runtime's.
        """
        bundle = self.path(namespace, id)
        for directory in (self._directory, bundle.parent, bundle, bundle / ROOTFS):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)  # noqa: PTH102 (`Path.mkdir` looks again at what exists)
        if not os.path.ismount(bundle / ROOTFS):
            # A container whose user namespace maps root elsewhere must get through to its rootfs.
            (bundle / ROOTFS).chmod(0o755)
        self._let_through(bundle, spec)
        (bundle / PROGRAM).write_text(program, encoding="utf-8")
        with suppress(FileExistsError):
            os.symlink(_LOG_FROM_HERE, bundle / LOG)  # noqa: PTH211
        beside = bundle / f".{CONFIG}.{os.getpid()}"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(json.dumps(spec, separators=(",", ":")))  # `json.dump` does without C's encoder
        beside.rename(bundle / CONFIG)
        return bundle

    def _let_through(self, bundle: Path, spec: dict[str, Any]) -> None:
        """Lets a container whose root is somebody else here through to its rootfs: that one's group, and nobody else.

        Files in there may be setuid, so the bundle isn't everybody's; what is above it has nothing to be found by name.
        """
        maps = (spec.get("linux") or {}).get("gidMappings") or []
        root = next((one["hostID"] for one in maps if one["containerID"] == 0), None)
        if root is None:
            return
        os.chown(bundle, 0, root)
        bundle.chmod(0o710)
        for directory in (bundle.parent, self._directory, self._directory.parent, self._directory.parent.parent):
            mode = stat.S_IMODE(directory.stat().st_mode)
            if not mode & stat.S_IXOTH:
                directory.chmod(mode | stat.S_IXOTH)

    async def discard(self, namespace: str, id: str) -> None:
        """`remove`, in a thread unless there is no more in it than was made here."""
        bundle = self.path(namespace, id)
        try:
            os.rmdir(bundle / ROOTFS)  # noqa: PTH106 (fails on a mount point)
            for name in (CONFIG, PROGRAM, LOG):
                (bundle / name).unlink()
            os.rmdir(bundle)  # noqa: PTH106
        except OSError:
            await asyncio.to_thread(self.remove, namespace, id)

    def remove(self, namespace: str, id: str) -> None:
        """Removes a bundle that may be there, once nothing is mounted in it any more."""
        bundle = self.path(namespace, id)
        rootfs = bundle / ROOTFS
        if not bundle.is_dir():
            return
        if os.path.ismount(rootfs):
            mounts.unmount_all(str(rootfs))
            if os.path.ismount(rootfs):
                # Going on would delete the container's files, or its image's.
                raise Internal(f"container {id}: its rootfs is still mounted at {rootfs}")
        shutil.rmtree(bundle, ignore_errors=True)

    def namespaces(self) -> list[str]:
        """The namespaces that have, or had, a bundle."""
        return sorted(entry.name for entry in self._directory.iterdir()) if self._directory.is_dir() else []

    def forget(self, namespace: str) -> None:
        """Removes the directory of a namespace without bundles."""
        with suppress(OSError):
            (self._directory / namespace).rmdir()

    def all(self) -> Iterator[tuple[str, str]]:
        """Namespace and id of every bundle there is."""
        for namespace in self.namespaces():
            for bundle in sorted((self._directory / namespace).iterdir()):
                yield namespace, bundle.name
