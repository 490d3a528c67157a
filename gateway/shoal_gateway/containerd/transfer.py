"""containerd.services.transfer.v1.Transfer: pulls, pushes, imports, exports and tags, by what stands at either end.

Each is one operation of the content service, whose progress goes to the stream that the client names. A client that
goes away cancels it, and it is undone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from functools import partial
from pathlib import Path

from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from shoal_bus import image_reference
from shoal_bus.api import content, snapshot
from shoal_bus.errors import InvalidArgument, Unimplemented

from shoal_gateway import archives
from shoal_gateway.call import Call
from shoal_gateway.proto.containerd.services.transfer.v1 import transfer_pb2 as pb
from shoal_gateway.proto.containerd.types.transfer.imagestore_pb2 import ImageStore
from shoal_gateway.proto.containerd.types.transfer.importexport_pb2 import ImageExportStream, ImageImportStream
from shoal_gateway.proto.containerd.types.transfer.registry_pb2 import DISABLED, TRACE, OCIRegistry
from shoal_gateway.rpc import Servicer
from shoal_gateway.streams import Sender, Stream, Streams, received
from shoal_gateway.transfers import image_store
from shoal_gateway.transfers.progress import Told
from shoal_gateway.transfers.registry import Registry, registry
from shoal_gateway.typeurls import message_of

_ENDS: tuple[type[Message], ...] = (OCIRegistry, ImageStore, ImageImportStream, ImageExportStream)


class Transfer(Servicer):
    """`snapshotter` is where images are unpacked whose client doesn't say; `state` the node's state directory."""

    service = pb.DESCRIPTOR.services_by_name["Transfer"]

    def __init__(self, streams: Streams, state: Path, snapshotter: str = "") -> None:
        self._streams, self._state = streams, state
        self._snapshotter = snapshotter or snapshot.DEFAULT
        self._ways: dict[tuple[type[Message], type[Message]], Callable[..., Awaitable[None]]] = {
            (OCIRegistry, ImageStore): self._pull,
            (ImageStore, OCIRegistry): self._push,
            (ImageStore, ImageStore): self._tag,
            (ImageImportStream, ImageStore): self._import,
            (ImageStore, ImageExportStream): self._export,
            (ImageImportStream, ImageExportStream): self._pass_on,
        }

    async def transfer(self, call: Call, request: pb.TransferRequest) -> Empty:
        """Returns when everything is there. UNIMPLEMENTED for two ends between which nothing goes."""
        namespace = call.namespace
        with ExitStack() as stack:

            def stream(name: str) -> Stream:
                found = self._streams.get(namespace, name)
                stack.callback(found.close)
                return found

            told = Told(stream(request.options.progress_stream) if request.options.progress_stream else None)
            source, destination = _end(request.source, "source"), _end(request.destination, "destination")
            way = (
                self._ways.get((type(source), type(destination)))
                if source is not None and destination is not None
                else None
            )
            if way is None:
                raise _unimplemented(request.source, request.destination)
            await way(call, source, destination, told, stream)
        return Empty()

    async def _pull(
        self, call: Call, source: OCIRegistry, target: ImageStore, told: Told, stream: Callable[[str], Stream]
    ) -> None:
        origin = _registry(source, stream)
        told.say(f"Resolving from {origin}")
        if target.manifest_limit and not target.platforms:
            raise Unimplemented("manifest_limit: a pull needs the platforms that it is of")
        several = [image_store.platform_text(one) for one in target.platforms]
        several = several[: target.manifest_limit or None]
        unpacks = await image_store.unpacking(call, target, self._snapshotter)
        platform, snapshotter = unpacks[0] if unpacks else ("", "")
        if len(several) == 1:
            platform = several[0]
        name = target.name or str(image_reference.parse(source.reference))
        told.say(f"Pulling from {origin}")
        told.say("fetching image content", name)
        async with origin.access(call, self._state) as access:
            wanted = content.PullImage(
                name=source.reference, save_as=target.name, labels=dict(target.labels), snapshotter=snapshotter,
                platform=platform, platforms=several[1:] and several, all_platforms=not several,
                all_metadata=target.all_metadata, **access.model_dump(),
            )  # fmt: skip
            image = await call.operate(content.IMAGE_PULL, wanted, on_progress=partial(told.pulled, name))
        for number, (other, elsewhere) in enumerate(unpacks[1:]):
            further = content.UnpackImage(name=image.name, platform=other, snapshotter=elsewhere)
            await call.operate(content.IMAGE_UNPACK, further, step=f"unpack.{number}")
        shown = platform or next(iter(several), "")
        await told.finished(call, image.name, shown, "extracted" if unpacks else "complete")
        told.say("saved", image.name, image.target)
        await self._name(call, target, image, told)
        told.say(f"Completed pull from {origin}")

    async def _push(
        self, call: Call, source: ImageStore, target: OCIRegistry, told: Told, stream: Callable[[str], Stream]
    ) -> None:
        destination = _registry(target, stream)
        image = await image_store.named(call, source)
        platform, all_platforms = image_store.platforms_of(source.platforms)
        told.say(f"Pushing to {destination}")
        told.say("pushing content", image.name, image.target)
        async with destination.access(call, self._state) as access:
            wanted = content.PushImage(
                name=image.name, destination=target.reference, platform=platform, all_platforms=all_platforms,
                **access.model_dump(),
            )  # fmt: skip
            pushed = await call.operate(content.IMAGE_PUSH, wanted, on_progress=partial(told.pushed, image.name))
        await told.finished(call, image.name, platform, "complete")
        told.say("pushed content", image.name, pushed.target)
        told.say(f"Completed push to {destination}", target=pushed.target)

    async def _tag(
        self, call: Call, source: ImageStore, target: ImageStore, told: Told, stream: Callable[[str], Stream]
    ) -> None:
        image = await image_store.named(call, source)
        if not target.name and not target.extra_references:
            raise InvalidArgument("the destination has no image's name")
        if target.name:
            image = await image_store.store(call, target.name, image.target, dict(target.labels), "name")
        await self._name(call, target, image, told)

    async def _import(
        self, call: Call, source: ImageImportStream, target: ImageStore, told: Told, stream: Callable[[str], Stream]
    ) -> None:
        wanted = await image_store.archive(call, target, self._snapshotter)
        bytes_of = stream(source.stream)
        told.say("Importing")
        with archives.entry(self._state) as entry:
            request = content.ImportImages(
                archive=entry.name, labels=dict(target.labels), compress=source.force_compress, store=wanted
            )
            async with aclosing(received(bytes_of)) as chunks:
                imported = await archives.beside(call.operate(content.IMAGE_IMPORT, request), entry.feed(chunks))
        for image in imported.images:
            told.say("saved", image.name, image.target)
        told.say("Completed import")

    async def _export(
        self, call: Call, source: ImageStore, target: ImageExportStream, told: Told, stream: Callable[[str], Stream]
    ) -> None:
        names = await image_store.names_of(call, source)
        sender = Sender(stream(target.stream))
        told.say("Exporting")
        with archives.entry(self._state) as entry:
            wanted = content.ExportImages(
                names=names, archive=entry.name, all_platforms=target.all_platforms, keep_index=True,
                platforms=[image_store.platform_text(one) for one in target.platforms],
                skip_docker_manifest=target.skip_compatibility_manifest,
                skip_non_distributable=target.skip_non_distributable,
            )  # fmt: skip
            await archives.beside(call.operate(content.IMAGE_EXPORT, wanted), entry.drain(sender.write))
        told.say("Completed export")

    async def _pass_on(
        self,
        call: Call,
        source: ImageImportStream,
        target: ImageExportStream,
        told: Told,
        stream: Callable[[str], Stream],
    ) -> None:
        """From stream to stream, which is what containerd has for trying them out."""
        sender = Sender(stream(target.stream))
        async with aclosing(received(stream(source.stream))) as chunks:
            async for chunk in chunks:
                await sender.write(chunk)

    async def _name(self, call: Call, target: ImageStore, image: content.Image, told: Told) -> None:
        labels = image_store.further_labels(target)
        for number, name in enumerate(image_store.further_names(target, image.target)):
            further = await image_store.store(call, name, image.target, labels, f"further.{number}")
            told.say("saved", further.name, further.target)


def _end(packed: AnyProto, what: str) -> Message | None:
    """What stands at one end; None for what nothing here goes to or comes from."""
    name = packed.type_url.rpartition("/")[2]
    for kind in _ENDS:
        if kind.DESCRIPTOR.full_name == name:
            return message_of(packed, kind, what)
    return None


def _unimplemented(source: AnyProto, destination: AnyProto) -> Unimplemented:
    return Unimplemented(
        f"method Transfer not implemented for {source.type_url or 'nothing'} to {destination.type_url or 'nothing'}"
    )


def _registry(end: OCIRegistry, stream: Callable[[str], Stream]) -> Registry:
    resolver = end.resolver
    log = stream(resolver.logs_stream) if resolver.http_debug != DISABLED and resolver.logs_stream else None
    shown = log if resolver.http_debug != TRACE else None  # of connections there is nothing to be told
    return registry(end, stream(resolver.auth_stream) if resolver.auth_stream else None, shown)
