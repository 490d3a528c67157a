"""Images to and from archives: OCI image layouts as tar, and what `docker save` writes.

An archive travels through the file system of the node, below `<state>/archives`: a FIFO or a symbolic link that
somebody with access to that directory (root) has put there. A request names the entry and never a path, so that who may
only use the bus can't have a file of the host read or written.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shoal_bus.api.content.images import Image
from shoal_bus.message import Message, Request
from shoal_bus.types import Labels
from shoal_bus.verb import OperationVerb, behaves

ARCHIVES = "archives"
"""The directory of archives, below a node's state directory."""
_ENTRY = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$")


class NamePrefix(Message):
    """What the images of an archive's index are called by (containerd's ImageReference with `is_prefix`).

    An image that has but a tag there gets `name:tag`. One of a whole name keeps that, if `name` is what it begins with,
    or `allow_overwrite` lets it be any.
    """

    name: str
    allow_overwrite: bool = False
    add_digest: bool = False
    """It is also called `name@digest`, as is one that gets no other name, and the index."""
    skip_named_digest: bool = False
    """But not if it has another name by this prefix."""


class UnpackPlatform(Message):
    """Images of `platform` (empty: this node's own) are unpacked to `snapshotter`."""

    platform: str = ""
    snapshotter: str = Field(min_length=1)


class StoreArchive(Message):
    """An archive as containerd's transfer service stores one: its index and the index's images, named by rules.

    Of an index only those of `platforms` (exactly; none: all) are taken, and of them the first `manifest_limit` (0:
    all), in the order of `platforms`. An image that gets no name isn't stored.
    """

    index_name: str = ""
    index_names: list[str] = Field(default=[], max_length=1024)
    """Further names of the index, with `further_labels`."""
    prefixes: list[NamePrefix] = Field(default=[], max_length=1024)
    further_labels: Labels = {}
    """The labels of all that isn't called `index_name`."""
    platforms: list[str] = Field(default=[], max_length=1024)
    all_metadata: bool = False
    """Manifests and configurations of the other platforms, too, without their layers."""
    manifest_limit: int = Field(default=0, ge=0)
    unpacks: list[UnpackPlatform] = Field(default=[], max_length=64)


class ImportImages(Request):
    """An archive's images, with the names they have in it.

    `base_name` is for those that have but a tag there, or nothing; with it, images of other names are left out.
    `platform` is that of the images to take from an index; empty means this node's own. `all_platforms` takes all.
    """

    archive: str = _ENTRY
    base_name: str = ""
    digests: bool = False
    """Each image also gets the name `<base name>@<digest>`."""
    platform: str = ""
    all_platforms: bool = False
    snapshotter: str = "overlayfs"
    """Where the layers are unpacked to; empty only stores them."""
    labels: Labels = {}
    compress: bool = False
    """Layers of an archive without manifests of its own (`docker save`'s) are stored by gzip where they are plain."""
    store: StoreArchive | None = None
    """Names, platforms and snapshotters by these rules, and not by the fields above."""


class ImportedImages(Message):
    images: list[Image]


class ExportImages(Request):
    """Images into one archive; of an index those for `platform` (empty: this node's own), or all."""

    names: list[str] = Field(min_length=1, max_length=1024)
    archive: str = _ENTRY
    platform: str = ""
    all_platforms: bool = False
    platforms: list[str] = Field(default=[], max_length=1024)
    """Exactly these, and what is for none; the first one that there is is what `docker load` takes."""
    keep_index: bool = False
    """An index stays what it is also where not all of its images come along; else one of them is exported alone."""
    skip_docker_manifest: bool = False
    """No `manifest.json`: `docker load` of old doesn't read the archive then."""
    skip_non_distributable: bool = False
    """Leave out layers that their own descriptors forbid to distribute; whoever reads the archive has to fetch them."""


class ExportedImages(Message):
    names: list[str]
    size: int
    """Bytes of all blobs in the archive."""


class ArchiveProgress(Message):
    state: Literal["reading", "compressing", "storing", "unpacking", "writing", "done"] = "reading"
    bytes_done: int = 0
    bytes_total: int = 0
    """0 where that isn't known: of a FIFO."""
    name: str = ""
    """The image that is unpacked."""


IMAGE_IMPORT = OperationVerb(
    "content",
    "image",
    "import",
    ImportImages,
    ImportedImages,
    ArchiveProgress,
    quiet_seconds=0.1,
    tells_all=True,
    behaviour=behaves(
        "Takes the images of an archive, verifies and unpacks them.",
        "NOT_FOUND",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
        "ABORTED",
    ),
)
IMAGE_EXPORT = OperationVerb(
    "content",
    "image",
    "export",
    ExportImages,
    ExportedImages,
    ArchiveProgress,
    quiet_seconds=0.1,
    tells_all=True,
    behaviour=behaves(
        "Writes images to an archive.",
        "NOT_FOUND",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
        "ABORTED",
        "CANCELLED",
    ),
)
