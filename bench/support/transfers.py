"""Pushes, exports and imports: both command lines, a process from its start to its end."""

from __future__ import annotations

from itertools import count

from bench.support.effort import Effort
from bench.support.figures import Row, compare
from bench.support.fresh import SIDES, Fresh
from bench.support.layered import LARGE_LAYERS, SMALL_FILES, Sample, push_samples
from bench.support.scratch import Scratch
from tests.support import registry

TIME = 1.0
"""The budget: no slower."""
_STEPS = ("push", "export", "import")
_PUSHES = count()


def measure(scratch: Scratch, effort: Effort) -> list[Row]:
    """An image is pushed to another repository of its registry, exported, and imported by an empty daemon.

    The registry has the blobs, and mounts them where it is asked to.
    """
    rows = []
    with registry.running(scratch.directory / "registry") as served:
        push_samples(served.host)
        for sample in (SMALL_FILES, LARGE_LAYERS):
            times: dict[str, dict[str, list[float]]] = {step: {"containerd": [], "shoal": []} for step in _STEPS}
            for _ in range(effort.rounds):
                for opened in SIDES:
                    archive = scratch.directory / "archive.tar"
                    with opened(scratch) as side:
                        reference = sample.reference(served.host)
                        side.command(side.pull_command(reference))
                        for step, took in (
                            ("push", _push(side, served.host, sample)),
                            ("export", _timed(side, side.export_command(reference, archive))),
                        ):
                            times[step][side.name].append(took)
                    with opened(scratch) as side:
                        times["import"][side.name].append(_timed(side, side.import_command(archive)))
                        if side.files() < sample.files:
                            raise RuntimeError(f"{side.name}: unpacked {side.files()} files of {sample.name}")
                    archive.unlink()
            for step, both in times.items():
                rows.append(compare(f"{step}, {sample.name}", "s", both["containerd"], both["shoal"], budget=TIME))
    return rows


def _push(side: Fresh, host: str, sample: Sample) -> float:
    reference = f"{host}/pushed-{next(_PUSHES)}/{sample.repository}:latest"
    prepare, push = side.push_commands(sample.reference(host), reference)
    if prepare:
        side.command(prepare)
    return _timed(side, push)


def _timed(side: Fresh, command: list[str]) -> float:
    side.forget_caches()
    return side.command(command)
