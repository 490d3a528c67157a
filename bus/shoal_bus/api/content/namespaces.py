"""Namespaces."""

from __future__ import annotations

from shoal_bus.identifiers import Identifier
from shoal_bus.message import Empty, Message, Request
from shoal_bus.types import Labels
from shoal_bus.verb import StreamVerb, Verb, behaves


class Namespace(Message):
    name: str
    labels: Labels = {}


class NamespaceRequest(Request):
    name: Identifier


class SaveNamespace(Request):
    """`fields` (update only) names the labels to change, as `labels.<key>`; empty replaces all."""

    name: Identifier
    labels: Labels = {}
    fields: list[str] = []


class ListNamespaces(Request):
    pass


NAMESPACE_GET = Verb(
    "content",
    "namespace",
    "get",
    NamespaceRequest,
    Namespace,
    behaviour=behaves("A namespace.", "NOT_FOUND", whole_node=True),
)
NAMESPACE_LIST = StreamVerb(
    "content",
    "namespace",
    "list",
    ListNamespaces,
    Namespace,
    behaviour=behaves("Every namespace of the node.", whole_node=True),
)
NAMESPACE_CREATE = Verb(
    "content",
    "namespace",
    "create",
    SaveNamespace,
    Namespace,
    mutates=True,
    behaviour=behaves("Makes a namespace.", "ALREADY_EXISTS", whole_node=True),
)
NAMESPACE_UPDATE = Verb(
    "content",
    "namespace",
    "update",
    SaveNamespace,
    Namespace,
    mutates=True,
    behaviour=behaves("Changes a namespace's labels.", "NOT_FOUND", whole_node=True),
)
NAMESPACE_DELETE = Verb(
    "content",
    "namespace",
    "delete",
    NamespaceRequest,
    Empty,
    mutates=True,
    behaviour=behaves("Removes an empty namespace.", "NOT_FOUND", "FAILED_PRECONDITION", whole_node=True),
)
