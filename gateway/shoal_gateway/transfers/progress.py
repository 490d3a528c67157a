"""How far a transfer is, in the words that containerd's clients show."""

from __future__ import annotations

from contextlib import suppress

from shoal_bus.api import content
from shoal_bus.errors import ShoalError
from shoal_bus.types import Descriptor

from shoal_gateway.call import Call
from shoal_gateway.convert import descriptor_told
from shoal_gateway.proto.containerd.types.descriptor_pb2 import Descriptor as DescriptorProto
from shoal_gateway.proto.containerd.types.transfer.progress_pb2 import Progress
from shoal_gateway.streams import Stream

_LAYER = {"waiting": "waiting", "downloading": "downloading", "downloaded": "complete", "extracting": "extracting",
          "done": "extracted", "exists": "already exists"}  # fmt: skip
_BLOB = {"waiting": "waiting", "uploading": "uploading", "done": "complete", "exists": "already exists",
         "mounted": "already exists", "skipped": "complete"}  # fmt: skip
_WHOLE = frozenset({"complete", "extracted", "already exists"})


class Told:
    """The progress of one transfer, for a stream of the client's or (None) for nobody. A step is told once."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream
        self._last: dict[str, tuple[str, int]] = {}

    def say(self, event: str, name: str = "", target: Descriptor | None = None) -> None:
        """Something that concerns the transfer as a whole, or an image."""
        if self._stream is not None:
            self._stream.tell(
                Progress(event=event, name=name, desc=descriptor_told(target) if target is not None else None)
            )

    def pulled(self, name: str, progress: content.PullProgress) -> None:
        """Layers on their way here, of the image that `name` is."""
        for layer in progress.layers:
            self._blob(name, _LAYER[layer.state], layer.digest, layer.offset, layer.size)

    def pushed(self, name: str, progress: content.PushProgress) -> None:
        """Blobs on their way to a registry, of the image that `name` is."""
        for blob in progress.blobs:
            self._blob(name, _BLOB[blob.state], blob.digest, blob.offset, blob.size)

    async def finished(self, call: Call, image: str, platform: str, event: str) -> None:
        """The end of each layer: the operation's own may have overtaken what was to be told of them."""
        if self._stream is None:
            return
        with suppress(ShoalError):  # of an artifact, or for another platform, there are none to be told of
            resolved = await call.ask(content.IMAGE_RESOLVE, content.ResolveImage(name=image, platform=platform))
            for layer in resolved.layers:
                if self._last.get(layer.digest, ("", 0))[0] not in (event, "already exists"):
                    self._blob(image, event, layer.digest, layer.size, layer.size)

    def _blob(self, image: str, event: str, digest: str, offset: int, size: int) -> None:
        done = size if event in _WHOLE else offset
        if self._stream is None or self._last.get(digest) == (event, done):
            return
        self._last[digest] = event, done
        self._stream.tell(
            Progress(
                event=event, name=f"layer-{digest}", parents=[image], progress=done, total=size,
                desc=DescriptorProto(digest=digest, size=size),
            )
        )  # fmt: skip
