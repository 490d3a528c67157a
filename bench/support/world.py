"""Both sides, up and ready: the same image pulled into each, the same specification for every container."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.support import containerd, messages, shoal
from bench.support.scratch import Scratch
from bench.support.side import Side
from tests.support import images, registry


@dataclass
class World:
    """What the measurements work with."""

    scratch: Scratch
    containerd: containerd.Containerd
    shoal: shoal.Shoal
    reference: str
    """The image, in a registry on loopback; both sides have it."""
    rootfs: Path
    """The image's files as a plain directory, for the raw runtime."""
    seccomp: dict[str, Any]
    """shoal's default seccomp profile. Containers here have none, as those of containerd's stress tool and of `ctr`."""
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    """Mean milliseconds of each step of what was measured, by the measurement."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.containerd, self.shoal

    @contextmanager
    def with_seccomp(self) -> Iterator[None]:
        """Containers made in the block have the profile."""
        before = self.shoal.template
        template = before | {"linux": before["linux"] | {"seccomp": self.seccomp}}
        for side in self.sides:
            side.template = template
        try:
            yield
        finally:
            for side in self.sides:
                side.template = before

    @property
    def template(self) -> dict[str, Any]:
        return self.shoal.template


@asynccontextmanager
async def opened(scratch: Scratch) -> AsyncIterator[World]:
    """Both sides running until the block is left."""
    with ExitStack() as stack:
        directory = scratch.directory
        disks = {name: scratch.disk(name, stack) for name in ("c", "s")}
        image = images.busybox_image()
        docker_registry = stack.enter_context(registry.running(directory / "registry"))
        reference = images.push(image, docker_registry.host, "bench/busybox")
        daemon = stack.enter_context(containerd.running(disks["c"] / "root", directory / "crun"))
        node = stack.enter_context(shoal.running(disks["s"] / "root", directory / "srun"))
        async with AsyncExitStack() as clients:
            protocol = messages.generate(directory / "proto")
            # With one layer, its diff ID is the chain ID: the name both give its snapshot (OCI image-spec, config.md).
            parent = image.diff_ids[0]
            of_containerd = await clients.enter_async_context(
                containerd.Containerd.connect(daemon, protocol, scratch.mark, parent)
            )
            of_shoal = await clients.enter_async_context(shoal.Shoal.connect(node, scratch.mark))
            await asyncio.to_thread(daemon.pull, scratch.mark, reference)
            await of_shoal.pull(reference)
            of_shoal.parent = parent
            generated = await of_shoal.generated_spec(reference)
            seccomp = generated["linux"].pop("seccomp")
            of_containerd.template = of_shoal.template = generated
            rootfs = disks["c"] / "rootfs"
            _busybox(rootfs)
            yield World(scratch, of_containerd, of_shoal, reference, rootfs, seccomp)


def _busybox(directory: Path) -> None:
    """The layer's files, as they would be unpacked."""
    for info, data in images.busybox_layer().entries:
        path = directory / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if info.isdir():
            path.mkdir(exist_ok=True)
        elif info.issym():
            path.symlink_to(info.linkname)
        else:
            path.write_bytes(data)
            path.chmod(info.mode)
