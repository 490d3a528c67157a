"""The node itself, as a configuration of containerd's has it."""

from __future__ import annotations

from shoal_cli.containerd.configuration import Configuration
from shoal_cli.up.node import UpOptions, up


def run(configuration: Configuration) -> None:
    """Runs until SIGINT or SIGTERM. Its state directory can be walked through, as containerd's: the socket is in it."""
    configuration.state.mkdir(parents=True, exist_ok=True, mode=0o711)
    gateway = [
        "--address", str(configuration.address.absolute()),
        "--socket-uid", str(configuration.uid), "--socket-gid", str(configuration.gid),
    ]  # fmt: skip
    if configuration.ttrpc is not None:
        gateway += ["--ttrpc", str(configuration.ttrpc)]
    if configuration.snapshotter:
        gateway += ["--snapshotter", configuration.snapshotter]
    arguments = {"gateway": tuple(gateway)}
    if configuration.registry_config is not None:
        arguments["content"] = ("--registry-config", str(configuration.registry_config.absolute()))
    up(
        UpOptions(
            root=configuration.root, state=configuration.state, runtime=configuration.runtime,
            log_level=configuration.level, arguments=arguments, warnings=tuple(configuration.warnings),
        )
    )  # fmt: skip
