"""Detach keys: what is typed to leave, and what is typed and only looks like it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_bus.errors import InvalidArgument
from shoal_cli.detach import DEFAULT, KeyWatch, parse_keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (DEFAULT, b"\x10\x11"), ("ctrl-P", b"\x10"), ("ctrl-p,q", b"\x10q"), ("a,b,c", b"abc"), ("ctrl-@", b"\0"),
        ("ctrl-[,ctrl-\\\\,ctrl-],ctrl-^,ctrl-_".replace("\\\\", "\\"), b"\x1b\x1c\x1d\x1e\x1f"), ("", b""),
    ],
)  # fmt: skip
def test_keys_are_written_as_docker_writes_them(text: str, keys: bytes) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-1", "ab", "ctrl-p,,q", "ü", "ctrl-ü", "alt-x", ","])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="detach-keys"):
        parse_keys(text)


@given(st.binary(max_size=3), st.text("ab", max_size=30), st.lists(st.integers(1, 5), max_size=30))
def test_however_it_is_cut_all_before_the_keys_is_passed_on_and_nothing_else(
    keys: bytes, typed: str, cuts: list[int]
) -> None:
    keys, data = bytes(b"ab"[byte & 1] for byte in keys), typed.encode()
    watch, passed, found, rest = KeyWatch(keys), b"", False, data
    for cut in [*cuts, len(data) or 1]:
        piece, rest = rest[:cut], rest[cut:]
        if piece and not found:
            more, found = watch.feed(piece)
            passed += more
    at = data.find(keys) if keys else -1
    if at >= 0:
        assert (passed, found) == (data[:at], True)
    else:
        assert not found
        held = data.removeprefix(passed)
        assert passed + held == data
        assert held == b"" or (keys.startswith(held) and held != keys)
