"""Image names as people shorten them."""

from __future__ import annotations

DEFAULT_REGISTRY, DEFAULT_TAG = "docker.io", "latest"


def normalise(name: str) -> str:
    """The full name that Docker's shorthand stands for.

    >>> normalise("busybox")
    'docker.io/library/busybox:latest'
    >>> normalise("127.0.0.1:5000/web")
    '127.0.0.1:5000/web:latest'
    """
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = DEFAULT_REGISTRY, name if slash else f"library/{name}"
    if "@" in rest or ":" in rest.rpartition("/")[2]:
        return f"{first}/{rest}"
    return f"{first}/{rest}:{DEFAULT_TAG}"
