"""An image's history beside its layers, whatever its configuration says."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from shoal_bus.api import content
from shoal_bus.message import now
from shoal_bus.types import Descriptor, Platform
from shoal_cli.history import steps

DIGESTS = [f"sha256:{n:064x}" for n in range(4)]


def image(history: Any, layers: int = 2) -> content.ResolvedImage:
    described = [Descriptor(media_type="x", digest=DIGESTS[n], size=n + 1) for n in range(layers)]
    return content.ResolvedImage(
        image=content.Image(name="x", target=described[0], created_at=now(), updated_at=now()),
        manifest=described[0], config_descriptor=described[0], layers=described, diff_ids=DIGESTS[:layers],
        chain_id="", platform=Platform(os="linux", architecture="amd64"), config={"history": history}, size=1,
    )  # fmt: skip


def test_steps_without_files_have_no_layer() -> None:
    told = [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"created_by": "c"}]
    assert [(step.created_by, step.digest, step.size) for step in steps(image(told))] == [
        ("c", DIGESTS[1], 2), ("b", "", 0), ("a", DIGESTS[0], 1),
    ]  # fmt: skip


def test_layers_that_history_does_not_tell_of_are_shown() -> None:
    assert [step.digest for step in steps(image(None))] == [DIGESTS[1], DIGESTS[0]]
    assert [step.digest for step in steps(image([{"created_by": "a"}]))] == [DIGESTS[1], DIGESTS[0]]


def test_more_steps_than_layers_have_none() -> None:
    assert [step.digest for step in steps(image([{}] * 3))] == ["", DIGESTS[1], DIGESTS[0]]


def test_what_a_terminal_would_obey_is_taken_out() -> None:
    (step,) = steps(image([{"created_by": "\x1b]0;x\x07a\u202eb\x9bc", "comment": 5}], layers=1))
    assert step.created_by.isprintable()
    assert step.comment == ""


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["created", "created_by", "comment", "empty_layer"]), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_whatever_history_is_each_layer_is_shown_once(history: Any) -> None:
    found = [step.digest for step in steps(image(history)) if step.digest]
    assert found == [DIGESTS[1], DIGESTS[0]]
