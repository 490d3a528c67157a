"""The command line, put together."""

from __future__ import annotations

import typer

from shoal_cli.commands import containers, events, images, network, node, stats, tasks
from shoal_cli.errors import EXPLAINED

app = typer.Typer(
    name="shoal",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Containers on Linux, over NATS: images, snapshots, execution and networks, each a service on the bus.",
    epilog=EXPLAINED,
)
for family in (node, images, containers, tasks, stats, events):
    app.add_typer(family.app)
app.add_typer(network.app, name="network")
