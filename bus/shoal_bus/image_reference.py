"""Image references, by the grammar of distribution/reference, with Docker's defaults for short ones.

>>> str(parse("busybox"))
'docker.io/library/busybox:latest'
>>> parse("localhost:5000/a/b@sha256:" + "0" * 64).domain
'localhost:5000'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal_bus.errors import InvalidArgument
from shoal_bus.types import check_digest

DEFAULT_DOMAIN, DEFAULT_TAG = "docker.io", "latest"
_OFFICIAL = "library/"
_LONGEST_NAME = 255
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BARE_ID = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True)
class Reference:
    """A whole reference: where the registry is, which repository, and which of its images."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def selector(self) -> str:
        """What names the manifest at the registry: the digest where there is one."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.domain}/{self.path}{tag}" + (f"@{self.digest}" if self.digest else "")


def parse(text: str) -> Reference:
    """The reference `text` stands for; INVALID_ARGUMENT says what is wrong with one that can't be read."""
    if _BARE_ID.fullmatch(text):
        raise _invalid(text, "64 hexadecimal digits are an id, not a name")
    rest, _, digest = text.partition("@")
    if "@" in text:
        try:
            check_digest(digest)
        except ValueError as error:
            raise _invalid(text, str(error)) from None
    name, tag = rest, ""
    slash, colon = rest.rfind("/"), rest.rfind(":")
    if colon > slash:
        name, tag = rest[:colon], rest[colon + 1 :]
        if not _TAG.fullmatch(tag):
            raise _invalid(text, f"{tag!r} is no tag")
    domain, path = _split(name)
    if not _DOMAIN.fullmatch(domain):
        raise _invalid(text, f"{domain!r} is no registry")
    if not _PATH.fullmatch(path):
        lower = path != path.lower() and _PATH.fullmatch(path.lower())
        raise _invalid(text, "the repository must be in lower case" if lower else f"{path!r} is no repository")
    if len(domain) + 1 + len(path) > _LONGEST_NAME:
        raise _invalid(text, f"its name is longer than {_LONGEST_NAME} characters")
    return Reference(domain, path, tag or ("" if digest else DEFAULT_TAG), digest)


def is_repository(path: str) -> bool:
    """Whether a registry may have a repository of that name."""
    return len(path) <= _LONGEST_NAME and _PATH.fullmatch(path) is not None


def _split(name: str) -> tuple[str, str]:
    head, slash, tail = name.partition("/")
    if not slash or not (any(c in head for c in ".:") or head == "localhost" or head != head.lower()):
        head, tail = DEFAULT_DOMAIN, name
    if head == "index.docker.io":
        head = DEFAULT_DOMAIN
    if head == DEFAULT_DOMAIN and "/" not in tail:
        tail = _OFFICIAL + tail
    return head, tail


def _invalid(text: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"image {text[:300]!r}: {problem}", hint="as busybox, or registry.example/team/app:1.0")
