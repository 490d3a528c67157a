"""What commands tell a container's restart policy by its labels: that somebody has stopped it, as nerdctl does."""

from __future__ import annotations

import signal
from typing import Any

from shoal_bus import restart
from shoal_bus.api import runtime
from shoal_bus.client import PATIENCE_SECONDS, Client

_ENDING = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


def is_ending(number: int) -> bool:
    """Whether who sends this signal wants the container to end."""
    return number in _ENDING


def is_restarting(container: runtime.Container, task: runtime.Task | None) -> bool:
    """Whether a container that has ended will be started again."""
    return task is not None and task.status == "stopped" and restart.is_wanted_again(container.labels, task.exit_status)


def shown(container: runtime.Container) -> dict[str, Any] | None:
    """What its labels say, for `inspect`; None where they say nothing."""
    labels = container.labels
    if restart.STATUS not in labels and restart.POLICY not in labels:
        return None
    return {
        "policy": labels.get(restart.POLICY) or "always",
        "desired_status": labels.get(restart.STATUS, ""),
        "count": restart.count_of(labels),
        "explicitly_stopped": restart.is_explicitly_stopped(labels),
        "log_uri": restart.log_uri_of(labels),
    }


async def stopping(client: Client, id: str, *, patience: float = PATIENCE_SECONDS) -> runtime.Container:
    """Says that somebody stops it; the container, as it was. `unless-stopped` needs to know no more."""
    request = runtime.GetContainer.of({"id": id})
    container = await client.call(runtime.CONTAINER_GET, request, patience=patience)
    if shown(container) is not None:
        await _label(client, id, restart.EXPLICITLY_STOPPED, "true")
    return container


async def stopped(client: Client, container: runtime.Container) -> None:
    """Says that it is to stay so, whatever its policy: the others don't heed who has stopped it."""
    if container.labels.get(restart.STATUS) == restart.RUNNING and not _heeds(container):
        await _label(client, container.id, restart.STATUS, restart.STOPPED)


def _heeds(container: runtime.Container) -> bool:
    return container.labels.get(restart.POLICY) == "unless-stopped"


async def _label(client: Client, id: str, label: str, value: str) -> None:
    request = runtime.UpdateContainer(id=id, labels={label: value}, fields=[f"labels.{label}"])
    await client.call(runtime.CONTAINER_UPDATE, request)
