"""What a registry's headers say, read with suspicion: what can't be meant is None, 0 or ValueError, never a crash."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime

from yarl import URL

_MOST_DIGITS = 18
_LINK = re.compile(r'<([^<>]*)>\s*;[^,]*\brel="?next"?(?:[\s;,]|$)')


def number(text: str) -> int | None:
    """A number in ASCII digits, below 10^18."""
    return int(text) if len(text) <= _MOST_DIGITS and text.isascii() and text.isdigit() else None


def retry_after(value: str, now: float | None = None) -> float:
    """How many seconds to wait, given as a number of them or as an HTTP date (RFC 9110, 10.2.3); 0 for nonsense."""
    seconds = number(value.strip())
    if seconds is not None:
        return float(seconds)
    try:
        until = parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError, AttributeError, OSError):
        return 0.0
    return max(0.0, until - (time.time() if now is None else now))


def first_byte(content_range: str) -> int | None:
    """Where the body of a 206 begins (RFC 9110, 14.4)."""
    unit, _, rest = content_range.partition(" ")
    return number(rest.partition("-")[0]) if unit == "bytes" else None


def bytes_taken(upload_range: str) -> int | None:
    """How many bytes of an upload a registry has, by its `Range: 0-<last>` (distribution-spec, chunked pushes).

    `0-0` is taken for none, which is what the distribution project's registry means by it.
    """
    first, dash, last = upload_range.removeprefix("bytes=").partition("-")
    end = number(last)
    if not dash or number(first) != 0 or end is None:
        return None
    return end + 1 if end else 0


def target(url: URL, location: str) -> URL:
    """Where a `Location` leads, letter by letter as it was written: it may be signed.

    ValueError for what is no place to go to, and for a step from TLS to none.
    """
    if not location or not location.isascii() or not location.isprintable() or " " in location:
        raise ValueError("it leads nowhere")
    found = url.join(URL(location, encoded=True))
    if found.scheme not in ("http", "https") or not found.host or not found.port:
        raise ValueError("it leads nowhere")
    if found.user is not None or found.password is not None:
        raise ValueError("it names a user")
    if url.scheme == "https" and found.scheme == "http":
        raise ValueError("it leads from TLS to none")
    return found


def next_page(link: str) -> str:
    """The target of a `Link` with `rel="next"` (RFC 8288); empty if there is none."""
    found = _LINK.search(link[:4096])
    return found[1] if found else ""


def with_query(url: URL, name: str, value: str) -> URL:
    """A URL with a parameter more, and the rest of it as it was."""
    text = str(url)
    return URL(f"{text}{'&' if '?' in text else '?'}{name}={value}", encoded=True)
