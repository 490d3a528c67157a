"""Image records: names for descriptors."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from shoal_bus.api.content import (
    IMAGES_CREATE,
    IMAGES_DELETE,
    IMAGES_UPDATE,
    CreateImage,
    DeleteImage,
    Image,
    ImageDeleted,
    ImageEvent,
    ImageRequest,
    ListImages,
    TagImage,
    UpdateImage,
)
from shoal_bus.context import Context
from shoal_bus.database import Database, Transaction
from shoal_bus.errors import AlreadyExists, InvalidArgument, NotFound
from shoal_bus.filters import compile_filters, label_field
from shoal_bus.message import Empty
from shoal_bus.types import Descriptor, Labels

from shoal_content import labels as label_sets
from shoal_content.collection.collect import Collector
from shoal_content.labels import dump, load
from shoal_content.leasing import attach

_PAGE = 500


class Images:
    """The image records of one node."""

    def __init__(self, database: Database, collector: Collector) -> None:
        self._db, self._collector = database, collector

    # -------------------------------------------------------------------------------------------------------- handlers

    async def get(self, ctx: Context, request: ImageRequest) -> Image:
        """An image record."""
        return self.record(ctx.namespace, request.name)

    async def list(self, ctx: Context, request: ListImages) -> AsyncIterator[Image]:
        """The image records of the namespace that match, by name."""
        matches = compile_filters(request.filters)
        after = ""
        while rows := self._db.read(
            "SELECT * FROM images WHERE namespace = ? AND name > ? ORDER BY name LIMIT ?", (ctx.namespace, after, _PAGE)
        ):
            for image in map(_image, rows):
                if matches(lambda path, image=image: _field(image, path)):  # type: ignore[misc]
                    yield image
            after = rows[-1]["name"]

    async def create(self, ctx: Context, request: CreateImage) -> Image:
        """Makes an image record; the blobs it names are looked at by whoever uses it."""
        with self._db.write(durable=True) as tx:
            if self.find(ctx.namespace, request.name) is not None:
                raise AlreadyExists(f"image {request.name}: is there already")
            moment = request.created_at
            image = self.put(tx, ctx.namespace, request.name, request.target, request.labels, ctx.id, moment)
            attach(tx, ctx.namespace, ctx.lease, "images", request.name)
            ctx.answer(tx, image)
        return image

    async def update(self, ctx: Context, request: UpdateImage) -> Image:
        """Changes an image record: its target, its labels, or some of them."""
        with self._db.write(durable=True) as tx:
            old = self.record(ctx.namespace, request.name)
            wants_target = not request.fields or "target" in request.fields
            if wants_target and request.target is None:
                raise InvalidArgument(f"image {request.name}: no target given to change to")
            target = request.target if wants_target and request.target is not None else old.target
            annotations = [path for path in request.fields if path.partition(".")[0] == "annotations"]
            if annotations:
                changed = label_sets.updated(target.annotations, request.annotations, annotations, "annotations")
                target = target.model_copy(update={"annotations": changed})
            paths = [path for path in request.fields if path != "target" and path not in annotations]
            kept = bool(request.fields) and not paths
            new_labels = old.labels if kept else label_sets.updated(old.labels, request.labels, paths)
            moment = request.updated_at or datetime.now(UTC)  # also where nothing is different: it was updated
            image = self.put(tx, ctx.namespace, request.name, target, new_labels, ctx.id, moment)
            ctx.answer(tx, image)
        if target.digest != old.target.digest:
            await self._collector.after_deletion(wait=False)
        return image

    async def tag(self, ctx: Context, request: TagImage) -> Image:
        """A further name for what an image names."""
        with self._db.write(durable=True) as tx:
            source, old = self.record(ctx.namespace, request.source), self.find(ctx.namespace, request.name)
            moves = old is not None and old.target.digest != source.target.digest
            if moves and not request.force:
                raise AlreadyExists(
                    f"image {request.name}: is there already, and is another one", hint="--force moves the name"
                )
            image = self.put(tx, ctx.namespace, request.name, source.target, source.labels, ctx.id)
            attach(tx, ctx.namespace, ctx.lease, "images", request.name)
            ctx.answer(tx, image)
        if moves:
            await self._collector.after_deletion(wait=True)
        return image

    async def delete(self, ctx: Context, request: DeleteImage) -> Empty:
        """Removes an image record; the blobs and snapshots that only it needed are collected."""
        with self._db.write(durable=True) as tx:
            there = self.record(ctx.namespace, request.name).target.digest
            if request.target is not None and there != request.target:
                raise NotFound(f"image {request.name}: has the target {there}, not {request.target}")
            tx.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (ctx.namespace, request.name))
            tx.emit(ctx.namespace, IMAGES_DELETE, ImageDeleted(name=request.name))
            ctx.answer(tx, Empty())
        await self._collector.after_deletion(wait=request.sync)
        return Empty()

    # --------------------------------------------------------------------------------------------------------- within

    def find(self, namespace: str, name: str) -> Image | None:
        """An image record, or None."""
        row = self._db.read_one("SELECT * FROM images WHERE namespace = ? AND name = ?", (namespace, name))
        return _image(row) if row is not None else None

    def every(self, namespace: str) -> Sequence[Image]:
        """The image records of a namespace, by name."""
        return [
            _image(row) for row in self._db.read("SELECT * FROM images WHERE namespace = ? ORDER BY name", (namespace,))
        ]

    def record(self, namespace: str, name: str) -> Image:
        """An image record; NOT_FOUND."""
        image = self.find(namespace, name)
        if image is None:
            raise NotFound(f"image {name}: not found", hint="pull it first")
        return image

    def put(
        self,
        tx: Transaction,
        namespace: str,
        name: str,
        target: Descriptor,
        labels: Labels,
        request_id: str,
        moment: datetime | None = None,
    ) -> Image:
        """Makes a record or changes it, with the event that says so; one that is so already stays as it is.

        With a `moment` it is made or changed then, and changed also where nothing is different.
        """
        now, old = moment.timestamp() if moment is not None else time.time(), self.find(namespace, name)
        if old is not None and moment is None and (old.target, old.labels) == (target, labels):
            return old
        tx.execute(
            "INSERT INTO images VALUES (:namespace, :name, :target, :labels, :now, :now, :request)"
            " ON CONFLICT DO UPDATE SET target = :target, labels = :labels, updated_at = :now, request_id = :request",
            {
                "namespace": namespace,
                "name": name,
                "target": target.model_dump_json(),
                "labels": dump(labels),
                "now": now,
                "request": request_id,
            },
        )
        tx.emit(namespace, IMAGES_CREATE if old is None else IMAGES_UPDATE, ImageEvent(name=name, labels=labels))
        return self.record(namespace, name)


def _image(row: sqlite3.Row) -> Image:
    return Image(
        name=row["name"],
        target=Descriptor.model_validate_json(row["target"]),
        labels=load(row["labels"]),
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        updated_at=datetime.fromtimestamp(row["updated_at"], UTC),
    )


def _field(image: Image, path: Sequence[str]) -> str | None:
    match path:
        case ["name"]:
            return image.name
        case ["target", "digest"]:
            return image.target.digest
        case ["target", "mediatype"]:
            return image.target.media_type
        case ["annotations", *key] if key:
            return image.target.annotations.get(".".join(key))
        case _:
            return label_field(image.labels, path)
