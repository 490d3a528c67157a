"""The images that are pulled: what people's images are made of, at its extremes. The same bytes in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.images import Entry, Image, Layer, directory, file, push

_SEED = 20261125
MIB = 1 << 20
_TEXT = b"".join(b"%08x the same words come again and again in what people write\n" % n for n in range(4096))
"""What compresses well: a third of a megabyte of it."""


@dataclass(frozen=True)
class Sample:
    """An image to pull: `name` in the table, its repository, and how many files it unpacks to."""

    name: str
    repository: str
    files: int

    def reference(self, host: str) -> str:
        return f"{host}/{self.repository}:latest"


SMALL_FILES = Sample("8 layers, 12,000 small files", "bench/small-files", 12_000)
LARGE_LAYERS = Sample("4 layers, 400 MB", "bench/large-layers", 4 * 25)
ONE_LAYER = Sample("1 layer, 200 MB", "bench/one-layer", 50)
MANY_LAYERS = Sample("40 layers", "bench/many-layers", 40 * 25)
SAMPLES = (SMALL_FILES, LARGE_LAYERS, ONE_LAYER, MANY_LAYERS)


def push_samples(host: str) -> None:
    """Makes the images, and pushes each to the registry."""
    generator = random.Random(_SEED)
    for sample in SAMPLES:
        push(Image.build([Layer(list(entries)) for entries in _layers(sample, generator)]), host, sample.repository)


def _layers(sample: Sample, generator: random.Random) -> Iterator[Iterator[Entry]]:
    match sample:
        case _ if sample is SMALL_FILES:
            return (_tree(f"usr/lib/l{n}", 1500, 1 << 10, 7 << 10, generator) for n in range(8))
        case _ if sample is LARGE_LAYERS:
            return (_tree(f"opt/l{n}", 25, 4 * MIB, 4 * MIB, generator) for n in range(4))
        case _ if sample is ONE_LAYER:
            return iter([_tree("opt/one", 50, 4 * MIB, 4 * MIB, generator)])
        case _:
            return (_tree(f"srv/l{n}", 25, 1 << 10, 16 << 10, generator) for n in range(40))


def _tree(base: str, count: int, least: int, most: int, generator: random.Random) -> Iterator[Entry]:
    """So many files, fifty to a directory; every other one doesn't compress."""
    for at, part in enumerate(parts := base.split("/")):
        yield directory("/".join([*parts[:at], part]))
    for number in range(count):
        place = f"{base}/d{number // 50}"
        if number % 50 == 0:
            yield directory(place)
        size = generator.randint(least, most)
        data = generator.randbytes(size) if number % 2 else _text(size)
        yield file(f"{place}/f{number}", data)


def _text(size: int) -> bytes:
    return (_TEXT * (size // len(_TEXT) + 1))[:size]
