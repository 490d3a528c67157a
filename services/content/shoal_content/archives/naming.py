"""What the images of an archive are called here: by `shoal load`'s rules, or by those of containerd's image stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shoal_bus import image_reference as reference
from shoal_bus.api.content import NamePrefix, StoreArchive
from shoal_bus.errors import FailedPrecondition, InvalidArgument
from shoal_bus.types import Descriptor, Labels

from shoal_content.archives.archive import CONTAINERD_NAME, REF_NAME, Found
from shoal_content.archives.work.errors import shown

_LONGEST_NAME = 4096


@dataclass(frozen=True)
class Stored:
    """An image that an import makes."""

    name: str
    target: Descriptor
    labels: Labels


class Names:
    """`shoal load`: images keep their names, or those with less than that get `base` with what they have."""

    def __init__(self, base: reference.Reference | None, *, digests: bool, date: str) -> None:
        self._base, self._digests = base, digests
        self._prefix = f"{base.domain}/{base.path}" if base is not None else f"import-{date}"

    def of(self, found: list[Found]) -> dict[str, tuple[Descriptor, list[str]]]:
        """The images that get a name, by digest, each with its names. FAILED_PRECONDITION when none does."""
        wanted: dict[str, tuple[Descriptor, list[str]]] = {}
        for one in found:
            names = [full for name in one.names if (full := self._full(name))]
            if not one.names and self._base is not None and len(found) == 1:
                names = [self._parsed(self._prefix)]
            if self._digests:
                repositories = {name.partition("@")[0].rpartition(":")[0] or name for name in names}
                repositories = repositories or ({self._prefix} if not one.names or self._base is None else set())
                names += [self._parsed(f"{name}@{one.target.digest}") for name in sorted(repositories)]
            if names:
                wanted[one.target.digest] = one.target, list(dict.fromkeys(names))
        if not wanted:
            called = ", ".join(shown(name) for one in found for name in one.names[:2]) or "nothing"
            raise FailedPrecondition(
                f"the archive's images aren't called anything that is wanted, but {called}",
                hint="give a --base-name, or --digests",
            )
        return wanted

    def _full(self, name: str) -> str:
        if not _is_whole(name):
            return self._parsed(f"{self._prefix}:{name}")
        parsed = self._parsed(name)
        repository = parsed.partition("@")[0].removesuffix(":" + parsed.rpartition(":")[2])
        if self._base is not None and not f"{repository}/".startswith(f"{self._prefix}/"):
            return ""
        return parsed

    @staticmethod
    def _parsed(name: str) -> str:
        try:
            return str(reference.parse(name))
        except InvalidArgument as error:
            raise FailedPrecondition(f"the archive has an image of a name that can't be: {error.message}") from None


def stored(store: StoreArchive, index: Descriptor, entries: Iterable[Descriptor], labels: Labels) -> list[Stored]:
    """What containerd's image store makes of an archive: its index first, then the index's images, as it has them."""
    found = [Stored(store.index_name, index, labels)] if store.index_name else []
    further = [*store.index_names, *(f"{one.name}@{index.digest}" for one in store.prefixes if one.add_digest)]
    found += [Stored(name, index, store.further_labels) for name in further]
    for entry in entries:
        for prefix in store.prefixes:
            found += [Stored(name, entry, store.further_labels) for name in _by_prefix(prefix, entry)]
    return found


def _by_prefix(prefix: NamePrefix, entry: Descriptor) -> list[str]:
    name = _annotated(entry.annotations, lambda told: _translated(prefix, told))
    names = [name] if name else []
    if prefix.add_digest and not (name and prefix.skip_named_digest):
        names.append(f"{prefix.name}@{entry.digest}")
    for one in names:
        if len(one) > _LONGEST_NAME or not one.isprintable():
            raise FailedPrecondition(f"the archive has an image of a name that can't be: {shown(one)[:300]!r}")
    return names


def _annotated(annotations: Mapping[str, str], translate: Callable[[str], str]) -> str:
    """The name of an index's entry. containerd's own annotation is a whole name, and taken as it is or not at all."""
    whole = annotations.get(CONTAINERD_NAME, "")
    if whole:
        return whole if translate(whole) == whole else ""
    told = annotations.get(REF_NAME, "")
    return translate(told) if told else ""


def _translated(prefix: NamePrefix, told: str) -> str:
    if not prefix.name:
        return ""
    if not _is_whole(told):
        return f"{prefix.name}:{told}"
    if prefix.allow_overwrite or told == prefix.name:
        return told
    rest = told.removeprefix(prefix.name)
    return told if rest != told and rest[0] in "/:@" else ""


def _is_whole(name: str) -> bool:
    """Whether a name is more than a tag."""
    return any(sign in name for sign in "/:@")
