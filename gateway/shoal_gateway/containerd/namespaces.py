"""containerd.services.namespaces.v1.Namespaces: the content service has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import content
from shoal_bus.errors import InvalidArgument, NotFound
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.identifiers import check_identifier

from shoal_gateway.call import Call
from shoal_gateway.convert import check_labels, labels_of
from shoal_gateway.proto.containerd.services.namespaces.v1 import namespace_pb2 as pb
from shoal_gateway.rpc import Servicer


class Namespaces(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Namespaces"]

    async def get(self, call: Call, request: pb.GetNamespaceRequest) -> pb.GetNamespaceResponse:
        """One that isn't there has no labels, as with containerd: clients ask for them before its first use."""
        name = _named(request.name)
        try:
            found = await call.ask(content.NAMESPACE_GET, content.NamespaceRequest(name=name))
        except NotFound:
            found = content.Namespace(name=name)
        return pb.GetNamespaceResponse(namespace=_told(found))

    async def list(self, call: Call, request: pb.ListNamespacesRequest) -> pb.ListNamespacesResponse:
        matches = compile_filters([request.filter] if request.filter else [])
        namespaces = [one async for one in call.items(content.NAMESPACE_LIST, content.ListNamespaces())]
        return pb.ListNamespacesResponse(namespaces=[_told(one) for one in namespaces if matches(partial(_field, one))])

    async def create(self, call: Call, request: pb.CreateNamespaceRequest) -> pb.CreateNamespaceResponse:
        asked = request.namespace
        made = await call.ask(
            content.NAMESPACE_CREATE,
            content.SaveNamespace(name=_named(asked.name), labels=check_labels(asked.labels)),
        )
        return pb.CreateNamespaceResponse(namespace=_told(made))

    async def update(self, call: Call, request: pb.UpdateNamespaceRequest) -> pb.UpdateNamespaceResponse:
        """A label that a path names and the request hasn't got, or has empty, is removed.

        As with containerd, labelling a namespace that isn't there makes it.
        """
        asked, paths = request.namespace, list(request.update_mask.paths)
        for path in paths:
            if not path.startswith("labels.") or path == "labels.":
                raise InvalidArgument(f"cannot update {path!r} field", hint="a namespace has labels.<key> alone")
        labels = labels_of(asked.labels)
        if paths:
            labels = {key: value for key, value in labels.items() if f"labels.{key}" in paths}
        wanted = content.SaveNamespace(name=_named(asked.name), labels=labels, fields=paths)
        try:
            changed = await call.ask(content.NAMESPACE_UPDATE, wanted)
        except NotFound:
            changed = await call.ask(content.NAMESPACE_CREATE, wanted.model_copy(update={"fields": []}))
        return pb.UpdateNamespaceResponse(namespace=_told(changed))

    async def delete(self, call: Call, request: pb.DeleteNamespaceRequest) -> Empty:
        await call.ask(content.NAMESPACE_DELETE, content.NamespaceRequest(name=_named(request.name)))
        return Empty()


def _named(name: str) -> str:
    return check_identifier(name, "namespace")


def _told(namespace: content.Namespace) -> pb.Namespace:
    return pb.Namespace(name=namespace.name, labels=namespace.labels)


def _field(namespace: content.Namespace, path: Sequence[str]) -> str | None:
    return namespace.name if list(path) == ["name"] else label_field(namespace.labels, path)
