"""JSON as shims read and write it is JSON; and what a zygote loads is next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import shoal_runtime
from hypothesis import given
from hypothesis import strategies as st
from shoal_runtime.shim import codec

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_written_is_read_by_anybody_and_back(value: object) -> None:
    assert json.loads(codec.dumps(value)) == value
    assert codec.loads(codec.dumps(value)) == value
    assert codec.loads(json.dumps(value, indent=1).encode()) == value


@pytest.mark.parametrize("text", [b"", b" ", b"{", b'{"a":}', b'{"a":1}x', b"[1,]", b"nul", b'"open', b"\xff", b"'a'"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        codec.loads(text)


def test_what_json_has_no_word_for_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="bytes"):
        codec.dumps({"a": b"bytes"})


def test_a_zygote_loads_nothing_heavy() -> None:
    root = str(Path(shoal_runtime.__file__).parent.parent)
    script = (
        f"import sys; sys.path.insert(0, {root!r}); from shoal_runtime.shim import zygote; print(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "json", "re", "typing", "enum", "socket", "signal", "shutil", "subprocess", "pydantic", "nats"}
    assert not heavy & set(done.stdout.split())
