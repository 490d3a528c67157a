"""Restart policies, as the labels of a container say them: containerd's restart monitor's labels, with its rules.

| label | |
| --- | --- |
| `containerd.io/restart.status` | what its task is to be: `running` or `stopped`; without it, nobody cares |
| `containerd.io/restart.policy` | when it is started again; without it, `always` |
| `containerd.io/restart.count` | how often it has been, whatever the policy; nothing sets it back |
| `containerd.io/restart.explicitly-stopped` | a client has stopped it: `unless-stopped` heeds that |
| `containerd.io/restart.loguri` | where its output goes once it is started again |

Clients write all of them but the count. nerdctl sets the policy when it makes a container, and once it has started it
the status (`running`) and `explicitly-stopped` (false), which its stop and kill set to true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

STATUS = "containerd.io/restart.status"
POLICY = "containerd.io/restart.policy"
COUNT = "containerd.io/restart.count"
EXPLICITLY_STOPPED = "containerd.io/restart.explicitly-stopped"
LOG_URI = "containerd.io/restart.loguri"
LOG_PATH = "containerd.io/restart.logpath"
"""What `loguri` was before there were URIs: a file's path. Clients of containerd 1.4 set it."""

RUNNING, STOPPED = "running", "stopped"

Name = Literal["no", "always", "unless-stopped", "on-failure"]
NAMES: tuple[Name, ...] = get_args(Name)
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})  # as strconv.ParseBool has it, which reads them there


@dataclass(frozen=True)
class Policy:
    """When a container is started again. `maximum` is how often at most, of `on-failure`; 0 is without an end."""

    name: Name
    maximum: int = 0

    @classmethod
    def parse(cls, text: str) -> Policy:
        """The policy a label, or a person, names. ValueError with what is allowed.

        >>> Policy.parse("on-failure:3")
        Policy(name='on-failure', maximum=3)
        """
        given, colon, maximum = text.partition(":")
        name = next((one for one in NAMES if one == given), None)
        if name is None:
            raise ValueError(f"restart policy {text!r}: must be no, always, unless-stopped or on-failure[:N]")
        if not colon:
            return cls(name)
        if name != "on-failure":
            raise ValueError(f"restart policy {text!r}: only on-failure takes a number")
        if not (maximum.isascii() and maximum.isdecimal()):
            raise ValueError(f"restart policy {text!r}: {maximum!r} is not a number of restarts, as in on-failure:3")
        return cls(name, int(maximum))

    def __str__(self) -> str:
        return f"{self.name}:{self.maximum}" if self.maximum else self.name


RestartPolicy = Annotated[str, AfterValidator(lambda value: str(Policy.parse(value)))]
"""A pydantic field type that holds a policy's text."""


def labels_of(policy: str) -> dict[str, str]:
    """What a container that is about to run under `policy` is labelled with; nothing under `no`."""
    if policy == "no":
        return {}
    return {POLICY: policy, STATUS: RUNNING, EXPLICITLY_STOPPED: "false"}


def policy_of(labels: Mapping[str, str]) -> Policy:
    """The policy of a container with these labels. ValueError for a label that says none."""
    return Policy.parse(labels.get(POLICY) or "always")


def count_of(labels: Mapping[str, str]) -> int:
    """How often it has been started again; 0 where the label is no number."""
    text = labels.get(COUNT, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def is_explicitly_stopped(labels: Mapping[str, str]) -> bool:
    """Whether a client has said that it stopped it."""
    return labels.get(EXPLICITLY_STOPPED) in _TRUE


def is_wanted_again(labels: Mapping[str, str], exit_status: int) -> bool:
    """Whether a container whose task has ended with `exit_status` is to be started again; a bad label says no."""
    if labels.get(STATUS) != RUNNING:
        return False
    try:
        policy = policy_of(labels)
    except ValueError:
        return False
    match policy.name:
        case "always":
            return True
        case "unless-stopped":
            return not is_explicitly_stopped(labels)
        case "on-failure":
            count = labels.get(COUNT, "")
            countable = not count or (count.isascii() and count.isdecimal())
            return exit_status != 0 and countable and (not policy.maximum or count_of(labels) < policy.maximum)
    return False


def log_uri_of(labels: Mapping[str, str]) -> str:
    """Where a restarted container's output goes, or nothing."""
    if path := labels.get(LOG_PATH, ""):
        return labels.get(LOG_URI) or f"file://{path}"
    return labels.get(LOG_URI, "")
