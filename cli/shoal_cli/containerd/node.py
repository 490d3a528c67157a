"""The node itself, as a configuration of containerd's has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal_cli.containerd import cgroups
from shoal_cli.containerd.configuration import Configuration
from shoal_cli.containerd.printing import dump_processors
from shoal_cli.up.node import UpOptions, up

TASKS = "io.containerd.runtime.v2.task"
"""Containerd's directory of bundles, in its state directory."""
_BUNDLES = Path("runtime", "bundles")


def run(configuration: Configuration) -> None:
    """Runs until SIGINT or SIGTERM. Its state directory can be walked through, as containerd's: the socket is in it."""
    configuration.state.mkdir(parents=True, exist_ok=True, mode=0o711)
    warnings = [*configuration.warnings, *_likely_killed(configuration.oom_score)]
    _link_bundles(configuration.state)
    with cgroups.inside(configuration.cgroup), _processors(configuration) as processors:
        up(
            UpOptions(
                root=configuration.root, state=configuration.state, runtime=configuration.runtime,
                log_level=configuration.level, arguments=_arguments(configuration, processors),
                warnings=tuple(warnings),
            )
        )  # fmt: skip


@contextmanager
def _processors(configuration: Configuration) -> Iterator[str]:
    """The path of a file with the stream processors; empty where there are none.

    It is in memory, and lasts as long as this process: a node that is killed, or refused, leaves and changes none.
    """
    if not configuration.stream_processors:
        yield ""
        return
    with os.fdopen(os.memfd_create("stream-processors"), "w", encoding="utf-8") as file:
        file.write(dump_processors(configuration))
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _arguments(configuration: Configuration, processors: str) -> dict[str, tuple[str, ...]]:
    """What each service is told. `processors` is the path of their file."""
    gateway = [
        "--address", str(configuration.address.absolute()),
        "--socket-uid", str(configuration.uid), "--socket-gid", str(configuration.gid),
    ]  # fmt: skip
    if configuration.ttrpc is not None:
        gateway += ["--ttrpc", str(configuration.ttrpc)]
    if configuration.snapshotter:
        gateway += ["--snapshotter", configuration.snapshotter]
    interval = configuration.restart_interval if configuration.restarts else 0
    arguments = {"gateway": tuple(gateway), "runtime": ("--restart-interval", str(interval))}
    if configuration.registry_config is not None:
        arguments["content"] = ("--registry-config", str(configuration.registry_config.absolute()))
    if processors:
        arguments["snapshot"] = ("--stream-processors", processors)
    return arguments


def _likely_killed(score: int) -> list[str]:
    """Sets the OOM score adjustment of this process, which what it starts inherits; what can't be said of it."""
    if score:
        try:
            Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")
        except OSError as error:
            return [f"oom_score: {score} can't be set: {error.strerror}"]
    return []


def _link_bundles(state: Path) -> None:
    """Has containerd's own path lead to the bundles: for what looks there for a rootfs or a configuration."""
    link = state / TASKS
    if link.is_symlink():
        link.unlink()
    if not link.exists():
        link.symlink_to(_BUNDLES)
