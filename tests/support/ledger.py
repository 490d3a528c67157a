"""What a container's clients were told, held against what the event stream says of it: each thing once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal_bus.api import runtime as api
from shoal_bus.events import Event


@dataclass
class Told:
    """What the answers have said of one container. Of a process: its pid, and how it ended."""

    id: str
    pid: int = 0
    started: bool = False
    exit: api.Exit | None = None
    execs: dict[str, int] = field(default_factory=dict)
    exec_exits: dict[str, api.Exit] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    """Every answer, for who has to find out what went wrong."""


def differences(told: Told, events: Sequence[Event]) -> list[str]:
    """What is wrong with the events of a container that has been made, had its life, and been removed."""
    found: list[str] = []

    def once(topic: str, wanted: int, **fields: Any) -> None:
        which = [e for e in events if e.topic == topic and all(e.payload.get(k) == v for k, v in fields.items())]
        if len(which) != wanted:
            found.append(f"{topic} {fields or ''} {len(which)} times instead of {wanted}")

    lived = told.exit is not None
    once("/containers/create", 1)
    once("/containers/delete", 1)
    for topic, wanted in (("/tasks/create", lived), ("/tasks/start", told.started), ("/tasks/delete", lived)):
        once(topic, int(wanted), **({"pid": told.pid} if wanted else {}))
    once("/tasks/exit", int(lived) + len(told.execs))
    for exec_id, pid in told.execs.items():
        once("/tasks/exec-added", 1, exec_id=exec_id)
        once("/tasks/exec-started", 1, exec_id=exec_id, pid=pid)
    once("/tasks/exec-added", len(told.execs))
    once("/tasks/exec-started", len(told.execs))
    exits = ([(told.id, told.exit)] if told.exit is not None else []) + list(told.exec_exits.items())
    for name, exit in exits:
        same = {"id": name, "pid": exit.pid, "exit_status": exit.exit_status, "exited_at": exit.exited_at}
        once("/tasks/exit", 1, **same)
    for exec_id in told.execs.keys() - told.exec_exits.keys():
        once("/tasks/exit", 1, id=exec_id)
    if told.exit is not None:
        once("/tasks/delete", 1, exit_status=told.exit.exit_status, exited_at=told.exit.exited_at)
    return found + _disorder(told, events)


def _disorder(told: Told, events: Sequence[Event]) -> list[str]:
    """Where one thing is told before another that comes first."""
    steps = [_step(told.id, event) for event in events]
    chains = [["/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]]
    chains[0].append("/containers/delete")
    for exec_id in told.execs:
        own = [f"/tasks/exec-added {exec_id}", f"/tasks/exec-started {exec_id}", f"/tasks/exit {exec_id}"]
        chains.append(["/tasks/create", *own, "/tasks/delete"])
    found = []
    for chain in chains:
        order = [step for step in steps if step in chain]
        if order != sorted(order, key=chain.index):
            found.append(f"out of order: {', '.join(order)}")
    return found


def _step(id: str, event: Event) -> str:
    name = event.payload.get("exec_id") or (event.payload.get("id") if event.topic == "/tasks/exit" else "")
    return f"{event.topic} {name}" if name and name != id else event.topic
