"""What a container's restart labels and its task ask for, and when: nothing else decides it.

The rules are those of containerd's restart monitor (`shoal_bus.restart`); the times are this one's own. Its monitor
looks every ten seconds, so a client that kills a container has that long, at most, to delete it, too. Here an exit is
acted on at once, but:

- what a client has just signalled is left to it for an `interval`, and so is a container whose task is gone;
- what ends again and again waits twice as long each time, up to an `interval`; having run for one, it begins anew.

A task that is created and not started belongs to the client that will start it, and a paused one stays paused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shoal_bus import restart

INTERVAL_SECONDS = 10.0
"""containerd's."""
FIRST_PAUSE_SECONDS = 0.1
_FAILED = 255
"""Stands for the exit status of a start that came to nothing: the policy takes it for a failure."""


@dataclass(frozen=True)
class Look:
    """A container as it was found. Times are seconds since 1970; 0 where there is none."""

    namespace: str
    id: str
    labels: Mapping[str, str]
    latest: str = ""
    """The request id of the newest start by `start`."""
    pause: float = 0.0
    began_at: float = 0.0
    failed_at: float = 0.0
    killed_at: float = 0.0
    held_until: float = 0.0
    task: str = ""
    """The request id of its task's creation: tells one life from the next."""
    status: str = ""
    """Its task's status; empty without a task."""
    exit_status: int = 0
    exited_at: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.id

    @property
    def situation(self) -> tuple[str, ...]:
        """What has to stay as it is for a while where no exit says when it began."""
        return self.latest, self.task, self.status, self.labels.get(restart.STATUS, "")


@dataclass(frozen=True)
class Decision:
    """To start it or to stop it, not before `at` (seconds since 1970)."""

    action: Literal["start", "stop"]
    at: float


def decide(look: Look, *, since: float, interval: float = INTERVAL_SECONDS) -> Decision | None:
    """What is due, if anything is. `since` is when it was first found in this situation."""
    match look.labels.get(restart.STATUS):
        case restart.RUNNING if is_wanted_again(look):
            ended = max(look.exited_at, look.failed_at)
            at = ended + next_pause(look, interval) if ended else since + interval
            if look.killed_at:
                at = max(at, look.killed_at + interval)
            # A clock that was set back must not make it wait for ever.
            return Decision("start", max(min(at, since + interval), look.held_until))
        case restart.STOPPED if look.status in ("created", "running", "paused"):
            return Decision("stop", since + interval)
    return None


def is_wanted_again(look: Look) -> bool:
    """Whether its policy would have it started now, had it waited long enough."""
    if look.status not in ("", "stopped"):
        return False
    failed = look.failed_at > look.exited_at
    return restart.is_wanted_again(look.labels, _FAILED if failed else look.exit_status)


def next_pause(look: Look, interval: float) -> float:
    """Seconds from its end to its next start."""
    ended = max(look.exited_at, look.failed_at)
    if not look.began_at or ended - look.began_at >= interval:
        return min(FIRST_PAUSE_SECONDS, interval)
    return min(max(look.pause * 2, FIRST_PAUSE_SECONDS), interval)
