"""JSON by the interpreter's own C functions, without the package `json`.

That package brings `re` and what `re` brings with it, more than a mebibyte in the zygote, and its Python layer is pages
in every worker. What is missing here: options, and errors that say where the text is wrong.
"""

from __future__ import annotations

import _json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Scanning:
    """What `json.JSONDecoder` is by default, as its scanner looks at it."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _unencodable(value: object) -> None:
    raise TypeError(f"{type(value).__name__} can't be JSON")


_scan = _json.make_scanner(_Scanning)  # type: ignore[arg-type]
_encode = _json.make_encoder(
    None, _unencodable, _json.encode_basestring_ascii, None, ":", ",", False, False, True
)  # fmt: skip


def dumps(value: object) -> bytes:
    """`value` (maps, lists, strings, numbers, booleans, None) as compact JSON. TypeError for anything else."""
    return "".join(_encode(value, 0)).encode()


def loads(data: bytes | bytearray) -> Any:
    """The value that a JSON text is. ValueError when it isn't one."""
    text = data.decode().strip()
    try:
        value, end = _scan(text, 0)
    except (StopIteration, SystemError):  # the latter where it looks for the package's own error, in vain
        raise ValueError("no JSON") from None
    if end != len(text):
        raise ValueError("more than JSON")
    return value
