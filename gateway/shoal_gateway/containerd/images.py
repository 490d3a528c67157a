"""containerd.services.images.v1.Images: the content service has their records."""

from __future__ import annotations

from contextlib import AbstractContextManager

from google.protobuf.empty_pb2 import Empty
from shoal_bus.api import content
from shoal_bus.errors import InvalidArgument
from shoal_bus.types import Descriptor

from shoal_gateway.call import Call
from shoal_gateway.convert import (
    descriptor_of,
    descriptor_told,
    digest_of,
    labels_of,
    moment_of,
    paths_of,
    quote,
    timestamp,
)
from shoal_gateway.errors import worded
from shoal_gateway.proto.containerd.services.images.v1 import images_pb2 as pb
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor as TargetMessage
from shoal_gateway.rpc import Servicer


class Images(Servicer):
    service = pb.DESCRIPTOR.services_by_name["Images"]

    async def get(self, call: Call, request: pb.GetImageRequest) -> pb.GetImageResponse:
        with _worded(request.name):
            found = await call.ask(content.IMAGE_GET, content.ImageRequest(name=request.name))
        return pb.GetImageResponse(image=_told(found))

    async def list(self, call: Call, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        images = call.items(content.IMAGE_LIST, content.ListImages(filters=list(request.filters)))
        return pb.ListImagesResponse(images=[_told(one) async for one in images])

    async def create(self, call: Call, request: pb.CreateImageRequest) -> pb.CreateImageResponse:
        asked = request.image
        wanted = content.CreateImage(
            name=_named(asked.name),
            target=_target(asked.target),
            labels=labels_of(asked.labels),
            created_at=moment_of(request.source_date_epoch) if request.HasField("source_date_epoch") else None,
        )
        with _worded(wanted.name):
            return pb.CreateImageResponse(image=_told(await call.ask(content.IMAGE_CREATE, wanted)))

    async def update(self, call: Call, request: pb.UpdateImageRequest) -> pb.UpdateImageResponse:
        """Without a mask, labels and target are replaced."""
        asked, name = request.image, _named(request.image.name)
        paths = paths_of(
            request.update_mask, f"image {name!r}",
            whole=("labels", "target", "annotations"), maps=("labels", "annotations"),
        )  # fmt: skip
        wanted = content.UpdateImage(
            name=name,
            target=_target(asked.target) if not paths or "target" in paths else None,
            labels=labels_of(asked.labels),
            annotations=dict(asked.target.annotations),
            fields=paths,
            updated_at=moment_of(request.source_date_epoch) if request.HasField("source_date_epoch") else None,
        )
        with _worded(name):
            return pb.UpdateImageResponse(image=_told(await call.ask(content.IMAGE_UPDATE, wanted)))

    async def delete(self, call: Call, request: pb.DeleteImageRequest) -> Empty:
        target = digest_of(request.target.digest) if request.target.digest else None
        with _worded(request.name):
            await call.ask(
                content.IMAGE_DELETE, content.DeleteImage(name=request.name, sync=request.sync, target=target)
            )
        return Empty()


def _named(name: str) -> str:
    if not name:
        raise InvalidArgument("Image.Name required")
    return name


def _worded(name: str) -> AbstractContextManager[None]:
    return worded(quoted := f"image {quote(name)}", quoted)


def _target(told: TargetMessage) -> Descriptor:
    """A target that an image may have. INVALID_ARGUMENT."""
    target = descriptor_of(told)
    if not target.size:
        raise InvalidArgument("target.Size must be greater than zero")
    if not target.media_type:
        raise InvalidArgument("target.MediaType must be set")
    return target


def _told(image: content.Image) -> pb.Image:
    return pb.Image(
        name=image.name,
        labels=image.labels,
        target=descriptor_told(image.target),
        created_at=timestamp(image.created_at),
        updated_at=timestamp(image.updated_at),
    )
