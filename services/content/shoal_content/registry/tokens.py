"""The `Authorization` headers that registries have given for a credential, kept until they expire.

In memory alone. They are kept by registry, scopes and credential, so that nobody is ever given what was gotten with a
credential that isn't his.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import OrderedDict
from typing import Any

from shoal_content.registry.credentials import Credential

Scopes = tuple[str, ...]
"""What one asks the right for, as `repository:team/app:pull,push` (distribution's token scope documentation)."""

_LEAST_SECONDS, _MOST_SECONDS = 60.0, 6 * 3600.0
_LEEWAY_SECONDS = 10.0
_MOST = 1024


class Tokens:
    """What registries have let us in with."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[tuple[str, Scopes, bytes], tuple[str, float]] = OrderedDict()

    def get(self, registry: str, scopes: Scopes, credential: Credential | None) -> str:
        """The header to send; empty where there is none."""
        key = self._key(registry, scopes, credential)
        header, ends = self._kept.get(key, ("", math.inf))
        if time.monotonic() >= ends:
            del self._kept[key]
            return ""
        return header

    def put(self, registry: str, scopes: Scopes, credential: Credential | None, header: str, seconds: float) -> None:
        """Keeps a header for `seconds`."""
        key = self._key(registry, scopes, credential)
        self._kept[key] = header, time.monotonic() + seconds
        self._kept.move_to_end(key)
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)

    def _key(self, registry: str, scopes: Scopes, credential: Credential | None) -> tuple[str, Scopes, bytes]:
        parts = (
            (credential.user, credential.password, credential.identity_token, credential.token) if credential else ()
        )
        hashed = hashlib.blake2b(key=self._secret, digest_size=16)
        for part in parts:
            data = part.encode(errors="surrogateescape")
            hashed.update(len(data).to_bytes(8, "big") + data)
        return registry, scopes, hashed.digest()


def lifetime(expires_in: Any) -> float:
    """How long a token may be used whose service said so; a minute where it said nothing that makes sense."""
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float):
        expires_in = _LEAST_SECONDS
    # In this order NaN, which JSON may hold here, is as good as nothing.
    return float(min(_MOST_SECONDS, max(_LEAST_SECONDS, expires_in))) - _LEEWAY_SECONDS
