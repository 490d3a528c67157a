"""Every subject of the system, made and taken apart here and nowhere else.

    request     shoal.v1.<node>.<namespace>.<service>.<resource>.<verb>
    command     shoal.v1.<node>.<namespace>.command.<service>.<resource>.<verb>
    event       shoal.v1.<node>.<namespace>.event.<service>.<topic...>.<id>
    broadcast   shoal.v1.<node>._.copies.<service>.<name>      from a copy of a service on a node to the others

Node and namespace are tokens, so that permissions can follow them. `_` stands for the namespace of verbs that concern
the whole node, and for the id of an event without one; `_all` as node addresses every node. What a token can't hold
(dots, wildcards, white space, non-ASCII) is percent-encoded, so that parsing gives back what building was given. An
event's id that would make the subject too long for the server is its SHA-256 there (`sha256:…`), and whole inside.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

from shoal_bus.errors import InvalidArgument

ROOT = "shoal.v1"
WHOLE_NODE = "_"
"""The namespace of verbs that concern the whole node, and the id of an event without one."""
ALL_NODES = "_all"
"""The node that every node answers for."""

EVENT = "event"
COMMAND = "command"
COPIES = "copies"
READY = "ready"
"""What a copy of a service broadcasts when it has begun to answer."""
_KINDS = frozenset({EVENT, COMMAND, COPIES})

_NODE = re.compile(r"[a-z0-9-]{1,63}")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_LONGEST_ID = 1024
"""Bytes of an id in a subject. A server ends a connection whose command line (PUB and all) is above 4096."""
LONGEST = 3072
"""Bytes that a subject may have at all."""
_SHOWN = 64
_REMEMBERED = 1024
"""Subjects and heads of them: what is asked of a node are a few verbs in a few namespaces, over and over."""


def check_node(node: str) -> str:
    """`node` itself, or INVALID_ARGUMENT: a node name is `[a-z0-9-]{1,63}` and nothing else."""
    if not _NODE.fullmatch(node):
        raise InvalidArgument(f"node name {node!r}: must be 1 to 63 characters of a-z, 0-9 and '-'")
    return node


def encode(value: str) -> str:
    """One subject token for `value`: letters, digits, `_` and `-` as they are, every other byte percent-encoded.

    A value that reads like one of the reserved tokens (`_`, `_all`) is encoded too, so that it can't be taken for it.

    >>> encode("docker.io/library/busybox:latest")
    'docker%2Eio%2Flibrary%2Fbusybox%3Alatest'
    """
    if not value:
        raise InvalidArgument("a subject token can't be empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{value!r}: not text that a subject can carry") from None
    if value.startswith("_"):
        return "%5F" + (encode(value[1:]) if len(value) > 1 else "")
    if _PLAIN.fullmatch(value):
        return value
    return quote(value, safe="-_").replace(".", "%2E").replace("~", "%7E")


def decode(token: str) -> str:
    """What `encode` was given; INVALID_ARGUMENT for a token that `encode` doesn't make.

    There is one way to write a value: permissions are given on tokens, and a second spelling would pass them by.
    """
    if _PLAIN.fullmatch(token) and not token.startswith("_"):
        return token
    try:
        value = unquote(token, errors="strict")
    except UnicodeDecodeError:
        raise InvalidArgument(f"subject token {token!r}: not UTF-8") from None
    if encode(value) != token:
        raise InvalidArgument(f"subject token {token!r}: must be written {encode(value)!r}")
    return value


def _node(node: str) -> str:
    return node if node == ALL_NODES else check_node(node)


def _namespace(namespace: str) -> str:
    return namespace if namespace == WHOLE_NODE else encode(namespace)


def _name(what: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        shown = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
        raise InvalidArgument(f"{what} {shown!r}: must be lower-case letters, digits, '-' and '_', at most 128")
    return value


def _service(value: str) -> str:
    if _name("service", value) in _KINDS:
        raise InvalidArgument(f"service {value!r}: that word is reserved")
    return value


@lru_cache(_REMEMBERED)
def request(node: str, namespace: str, service: str, resource: str, verb: str) -> str:
    """Where a request goes, as `shoal.v1.edge-7.default.runtime.task.start`."""
    path = f"{_service(service)}.{_name('resource', resource)}.{_name('verb', verb)}"
    return f"{ROOT}.{_node(node)}.{_namespace(namespace)}.{path}"


def request_pattern(node: str, service: str, resource: str, verb: str) -> str:
    """What a service subscribes to for a verb: the request of any namespace."""
    path = f"{_service(service)}.{_name('resource', resource)}.{_name('verb', verb)}"
    return f"{ROOT}.{_node(node)}.*.{path}"


def command(node: str, namespace: str, service: str, resource: str, verb: str) -> str:
    """Where a durable command goes: kept apart from requests, since a stream's PubAck would answer the caller."""
    path = f"{_service(service)}.{_name('resource', resource)}.{_name('verb', verb)}"
    return f"{ROOT}.{_node(node)}.{_namespace(namespace)}.{COMMAND}.{path}"


def command_pattern(node: str = "*") -> str:
    """What the command stream captures (any node), and what one node's dispatcher consumes."""
    return f"{ROOT}.{node if node == '*' else _node(node)}.*.{COMMAND}.>"


def _topic(topic: str) -> str:
    words = topic.strip("/").split("/")
    return ".".join(_name("topic", word) for word in words)


def event(node: str, namespace: str, service: str, topic: str, id: str = "") -> str:
    """Where an event goes; `topic` as containerd writes it (`/tasks/exit`), `id` of what it is about, if anything.

    >>> event("edge-7", "default", "runtime", "/tasks/exit", "web-1")
    'shoal.v1.edge-7.default.event.runtime.tasks.exit.web-1'
    """
    return f"{_event_head(node, namespace, service, topic)}.{_event_id(id) if id else WHOLE_NODE}"


def _event_id(id: str) -> str:
    token = encode(id)
    return token if len(token) <= _LONGEST_ID else encode(f"sha256:{hashlib.sha256(id.encode()).hexdigest()}")


@lru_cache(_REMEMBERED)
def _event_head(node: str, namespace: str, service: str, topic: str) -> str:
    return f"{ROOT}.{check_node(node)}.{_namespace(namespace)}.{EVENT}.{_service(service)}.{_topic(topic)}"


def event_pattern(node: str = "", namespace: str = "", service: str = "", topic: str = "", id: str = "") -> str:
    """A filter for events; what is empty matches anything. `topic` needs its service, and `id` its topic.

    >>> event_pattern("edge-7", service="runtime", topic="/tasks/exit")
    'shoal.v1.edge-7.*.event.runtime.tasks.exit.*'
    """
    if topic and not service:
        raise InvalidArgument("an event filter with a topic needs its service too")
    if id and not topic:
        raise InvalidArgument("an event filter with an id needs its topic too")
    head = f"{ROOT}.{check_node(node) if node else '*'}.{_namespace(namespace) if namespace else '*'}.{EVENT}"
    if not service:
        return f"{head}.>"
    if not topic:
        return f"{head}.{_service(service)}.>"
    return f"{head}.{_service(service)}.{_topic(topic)}.{_event_id(id) if id else '*'}"


@lru_cache(_REMEMBERED)
def broadcast(node: str, service: str, name: str) -> str:
    """Where the copies of one service on one node tell each other something; clients listen for `ready` alone."""
    return f"{ROOT}.{check_node(node)}.{WHOLE_NODE}.{COPIES}.{_service(service)}.{_name('broadcast', name)}"


def announcements(node: str) -> str:
    """Every service's `ready` on one node."""
    return f"{ROOT}.{check_node(node)}.{WHOLE_NODE}.{COPIES}.*.{READY}"


def queue_group(node: str, service: str) -> str:
    """The queue group the copies of a service on a node share; named for the node, so that `_all` reaches each."""
    return f"{check_node(node)}.{_service(service)}"


@dataclass(frozen=True, slots=True)
class Request:
    """A request's subject, taken apart."""

    node: str
    namespace: str
    service: str
    resource: str
    verb: str


@dataclass(frozen=True, slots=True)
class Command:
    """A durable command's subject, taken apart."""

    node: str
    namespace: str
    service: str
    resource: str
    verb: str


@dataclass(frozen=True, slots=True)
class Event:
    """An event's subject, taken apart: `topic` as containerd writes it, `id` empty where the event has none."""

    node: str
    namespace: str
    service: str
    topic: str
    id: str


def parse(subject: str) -> Request | Command | Event:
    """The subject taken apart, or INVALID_ARGUMENT if it isn't one of a request, a command or an event."""
    tokens = subject.split(".")
    if tokens[:2] != ROOT.split(".") or not all(tokens) or any(t in ("*", ">") for t in tokens):
        raise InvalidArgument(f"subject {subject!r}: not one of shoal's")
    match tokens[2:]:
        case [node, namespace, "event", service, *topic, id] if topic:
            return Event(
                check_node(node),
                _parsed_namespace(namespace),
                _service(service),
                "/" + "/".join(_name("topic", word) for word in topic),
                "" if id == WHOLE_NODE else decode(id),
            )
        case [node, namespace, "command", service, resource, verb]:
            names = _service(service), _name("resource", resource), _name("verb", verb)
            return Command(_node(node), _parsed_namespace(namespace), *names)
        case [node, namespace, service, resource, verb]:
            names = _service(service), _name("resource", resource), _name("verb", verb)
            return Request(_node(node), _parsed_namespace(namespace), *names)
        case _:
            raise InvalidArgument(f"subject {subject!r}: neither a request, a command nor an event")


def _parsed_namespace(token: str) -> str:
    return token if token == WHOLE_NODE else decode(token)
