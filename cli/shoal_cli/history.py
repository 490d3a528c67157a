"""An image's layers with what made each: the configuration's history beside the manifest's layers, the last one first.

OCI image-spec, config.md (`history`). What it says came with the image: it is shown printable, and never relied on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shoal_bus.api import content

from shoal_cli.output import printable


@dataclass(frozen=True)
class Step:
    """One step of an image's making; one that changed no files has no layer."""

    created: str
    created_by: str
    comment: str
    size: int
    digest: str
    diff_id: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def steps(image: content.ResolvedImage) -> list[Step]:
    """The steps, the last one first. Layers that the history doesn't tell of are steps of their own."""
    told = image.config.get("history")
    found: list[Step] = []
    at = 0
    for entry in told if isinstance(told, list) else []:
        if not isinstance(entry, dict):
            continue
        has_layer = entry.get("empty_layer") is not True and at < len(image.layers)
        found.append(_step(image, at if has_layer else None, entry))
        at += has_layer
    found += [_step(image, left, {}) for left in range(at, len(image.layers))]
    found.reverse()
    return found


def _step(image: content.ResolvedImage, at: int | None, entry: dict[str, Any]) -> Step:
    layer = image.layers[at] if at is not None else None
    return Step(
        created=_text(entry.get("created")),
        created_by=_text(entry.get("created_by")),
        comment=_text(entry.get("comment")),
        size=layer.size if layer is not None else 0,
        digest=layer.digest if layer is not None else "",
        diff_id=image.diff_ids[at] if at is not None and at < len(image.diff_ids) else "",
    )


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""
