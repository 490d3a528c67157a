"""Trees as text."""

from __future__ import annotations

from shoal_cli.trees import branches


def shown(parents: dict[str, str]) -> list[str]:
    return [before + key for before, key in branches(parents)]


def test_each_thing_stands_below_what_it_lies_on() -> None:
    parents = {"b": "a", "a": "", "c": "a", "d": "b", "e": "b", "x": "", "y": "x"}
    assert shown(parents) == ["a", "├─ b", "│  ├─ d", "│  └─ e", "└─ c", "x", "└─ y"]
    assert shown({}) == []


def test_what_lies_on_something_that_is_not_there_is_shown_all_the_same() -> None:
    assert shown({"b": "gone", "c": "b"}) == ["b", "└─ c"]


def test_a_chain_may_be_as_deep_as_it_likes() -> None:
    parents = {f"{n:04}": f"{n - 1:04}" if n else "" for n in range(3000)}
    lines = shown(parents)
    assert len(lines) == 3000
    assert lines[-1].endswith("└─ 2999")
