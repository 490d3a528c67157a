"""Which node and namespace a command is for: the options every client command has."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from shoal_bus.client import Client
    from shoal_bus.node import Node

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A command's addressee, as its options and the environment name it."""

    nats_url: str = ""
    state: Path | None = None
    node: str = ""
    namespace: str = "default"
    json: bool = False

    def find(self) -> Node:
        """The node meant. UNAVAILABLE when none is up here and no bus was named."""
        from shoal_bus.identifiers import check_identifier
        from shoal_bus.node import find

        check_identifier(self.namespace, "--namespace")
        return find(nats_url=self.nats_url, state=self.state, name=self.node)

    @asynccontextmanager
    async def client(self, *, lease: str = "") -> AsyncIterator[Client]:
        """A client of that node and namespace, connected for the length of the block.

        What is made through it belongs to `lease`, if there is one.
        """
        from shoal_bus.client import Client

        node = self.find()
        async with Client.open(node.address, node.name, self.namespace, name="shoal") as client:
            yield client.with_lease(lease) if lease else client


def _options(
    nats_url: Annotated[
        str,
        typer.Option(
            "--nats-url",
            envvar="SHOAL_NATS_URL",
            show_default=False,
            rich_help_panel="Which node",
            help="The bus, as nats://user:password@host:4222; else the one `shoal up` left in --state.",
        ),
    ] = "",
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            envvar="SHOAL_STATE",
            show_default="/run/shoal",
            rich_help_panel="Which node",
            help="The state directory of the node on this machine.",
        ),
    ] = None,
    node: Annotated[
        str,
        typer.Option(
            "--node",
            envvar="SHOAL_NODE",
            show_default=False,
            rich_help_panel="Which node",
            help="The node's name; else the one that is up here.",
        ),
    ] = "",
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace",
            "-n",
            envvar="SHOAL_NAMESPACE",
            rich_help_panel="Which node",
            help="The namespace of images and containers.",
        ),
    ] = "default",
    json: Annotated[
        bool, typer.Option("--json", rich_help_panel="Which node", help="Print JSON, for programs.")
    ] = False,
) -> None:
    """The options themselves, declared once."""  # fmt: skip


def client_command(
    function: Callable[Concatenate[Target, P], Coroutine[Any, Any, int | None]],
) -> Callable[..., None]:
    """Makes an asynchronous function of a Target and its own options a command with the common options besides.

    What the function returns is the exit code; None is 0.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    common = list(inspect.signature(_options, eval_str=True).parameters.values())
    names = [parameter.name for parameter in common]

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        target = Target(**{name: kwargs.pop(name) for name in names})
        code = asyncio.run(function(target, *args, **kwargs))
        if code:
            raise typer.Exit(code)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *common]]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # A paragraph of ours may be several lines; each would be a line of the help, however wide that is.
    text = inspect.getdoc(function) or ""
    command.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command
