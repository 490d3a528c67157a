"""What a service answers: a verb is a subject with the types of its request and its reply, and how it behaves.

    PULL = OperationVerb("content", "image", "pull", PullRequest, Image, PullProgress, doc="…")

A service registers a handler for it, a client calls it, and docs/subjects.md is made from it; none of them names a
subject. There are three kinds:

- `Verb`: one request, one reply. `mutates` says that it changes something: such a request is done once by its id.
  `waits` says that it may take as long as somebody else does (an exit): it is asked again in bounded polls, and it
  doesn't count against the bound on handlers.
- `StreamVerb`: one request, any number of items, sent as parts with flow control.
- `OperationVerb`: work of seconds to minutes (a pull), done once by its id, with progress, surviving the copy that
  began it. Its client polls; work that nobody has asked after for a while is cancelled and undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

from shoal_bus import subjects
from shoal_bus.message import Message, Request

Req = TypeVar("Req", bound=Request)
Rep = TypeVar("Rep", bound=Message)
Pro = TypeVar("Pro", bound=Message)


@dataclass(frozen=True, kw_only=True)
class _Behaviour:
    doc: str
    """One sentence for the reader of docs/subjects.md."""
    errors: tuple[str, ...] = ()
    """The canonical codes a caller should expect besides INVALID_ARGUMENT and UNAVAILABLE."""
    whole_node: bool = False
    """It concerns the node, not a namespace: its namespace token is `_`."""


@dataclass(frozen=True)
class AnyVerb:
    """What all kinds of verb have in common."""

    service: str
    resource: str
    verb: str
    request: type[Request]
    behaviour: _Behaviour = field(kw_only=True)

    @property
    def name(self) -> str:
        """The verb's short name, as `runtime.task.start`."""
        return f"{self.service}.{self.resource}.{self.verb}"

    def on(self, resource: str) -> Self:
        """The same verb of another resource: how one snapshotter of several is addressed."""
        return replace(self, resource=resource)

    def subject(self, node: str, namespace: str) -> str:
        """Where a request of this verb goes."""
        return subjects.request(node, namespace, self.service, self.resource, self.verb)

    def pattern(self, node: str) -> str:
        """What a service subscribes to in order to answer this verb."""
        return subjects.request_pattern(node, self.service, self.resource, self.verb)


@dataclass(frozen=True)
class Verb(AnyVerb, Generic[Req, Rep]):
    """One request, one reply."""

    request: type[Req]
    reply: type[Rep]
    mutates: bool = field(kw_only=True, default=False)
    waits: bool = field(kw_only=True, default=False)


@dataclass(frozen=True)
class StreamVerb(AnyVerb, Generic[Req, Rep]):
    """One request, any number of items."""

    request: type[Req]
    item: type[Rep]


@dataclass(frozen=True)
class OperationVerb(AnyVerb, Generic[Req, Rep, Pro]):
    """Long work with progress, done once by its id, that survives the copy of the service that began it."""

    request: type[Req]
    reply: type[Rep]
    progress: type[Pro]
    quiet_seconds: float = 0.0
    """No progress is told before: each telling is a reply, and one more request, of work that is over in a moment."""
    tells_all: bool = False
    """The last progress is told before the result, also of work that was over sooner than that."""


def behaves(doc: str, *errors: str, whole_node: bool = False) -> _Behaviour:
    """A verb's description, and the canonical codes its callers should expect."""
    return _Behaviour(doc=doc, errors=errors, whole_node=whole_node)


def verbs_of(module: Any) -> Iterator[AnyVerb]:
    """All verbs an API module defines, in the order it defines them."""
    return (value for value in vars(module).values() if isinstance(value, AnyVerb))
