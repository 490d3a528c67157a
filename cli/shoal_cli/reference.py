"""Image names as people shorten them."""

from __future__ import annotations

from shoal_bus.errors import InvalidArgument
from shoal_bus.image_reference import parse


def normalise(name: str) -> str:
    """The full name that Docker's shorthand stands for; one that is no reference, as a client may have made it, itself.

    >>> normalise("busybox")
    'docker.io/library/busybox:latest'
    >>> normalise("127.0.0.1:5000/web")
    '127.0.0.1:5000/web:latest'
    """
    try:
        return str(parse(name))
    except InvalidArgument:
        return name
