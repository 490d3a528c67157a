"""`IMAGE_RESOLVE`: an image for one platform, as whoever runs it needs it."""

from __future__ import annotations

from shoal_bus import image_reference as reference
from shoal_bus.api.content import Image, ResolvedImage, ResolveImage
from shoal_bus.context import Context
from shoal_bus.errors import InvalidArgument, NotFound

from shoal_content import media
from shoal_content.images import platforms
from shoal_content.images.records import Images
from shoal_content.images.tree import Trees


class Resolving:
    """`IMAGE_RESOLVE`: what whoever runs an image has to know of it."""

    def __init__(self, trees: Trees, images: Images) -> None:
        self._trees, self._images = trees, images

    async def resolve(self, ctx: Context, request: ResolveImage) -> ResolvedImage:
        """An image for one platform; a short name gets Docker's defaults where there is no image of just that name."""
        image = self._record(ctx.namespace, request.name)
        choice = self._trees.choose(ctx.namespace, image.name, image.target, request.platform)
        chain = media.chain_ids(choice.config.diff_ids)
        parts = [choice.descriptor, choice.manifest.config, *choice.manifest.layers]
        return ResolvedImage(
            image=image,
            manifest=choice.descriptor,
            config_descriptor=choice.manifest.config,
            layers=choice.manifest.layers,
            diff_ids=choice.config.diff_ids,
            chain_id=chain[-1] if chain else "",
            platform=choice.config.platform or platforms.wanted(request.platform)[0],
            config=choice.config.json,
            size=sum(one.size for one in parts),
        )

    def _record(self, namespace: str, name: str) -> Image:
        image = self._images.find(namespace, name)
        if image is None:
            try:
                name = str(reference.parse(name))
            except InvalidArgument:
                raise NotFound(f"image {name}: not found", hint="pull it first") from None
            image = self._images.record(namespace, name)
        return image
