"""What is told of blobs, images and namespaces."""

from __future__ import annotations

from shoal_bus.events import Topic
from shoal_bus.message import Message
from shoal_bus.types import Labels


class ImageEvent(Message):
    """Payload of `/images/create` and `/images/update`."""

    name: str
    labels: Labels = {}


class ImageDeleted(Message):
    name: str


class ContentEvent(Message):
    """Payload of `/content/create`."""

    digest: str
    size: int


class ContentDeleted(Message):
    digest: str


class ContentRotten(Message):
    """Payload of `/content/rotten`: a blob's bytes were found not to be what its digest says, in each namespace."""

    digest: str
    size: int
    problem: str


class NamespaceEvent(Message):
    name: str
    labels: Labels = {}


class NamespaceDeleted(Message):
    name: str


IMAGES_CREATE = Topic("content", "/images/create", ImageEvent, "name")
IMAGES_UPDATE = Topic("content", "/images/update", ImageEvent, "name")
IMAGES_DELETE = Topic("content", "/images/delete", ImageDeleted, "name")
CONTENT_CREATE = Topic("content", "/content/create", ContentEvent, "digest")
CONTENT_DELETE = Topic("content", "/content/delete", ContentDeleted, "digest")
CONTENT_ROTTEN = Topic("content", "/content/rotten", ContentRotten, "digest")
NAMESPACES_CREATE = Topic("content", "/namespaces/create", NamespaceEvent, "name")
NAMESPACES_UPDATE = Topic("content", "/namespaces/update", NamespaceEvent, "name")
NAMESPACES_DELETE = Topic("content", "/namespaces/delete", NamespaceDeleted, "name")
