"""Containerd's filter language, as `ctr` users write it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from shoal_bus.errors import InvalidArgument
from shoal_bus.filters import compile_filters, label_field

ITEM = {"name": "docker.io/library/busybox:latest", "id": "web-1"}
LABELS = {"app": "web", "io.kubernetes.pod": "a b", "empty": ""}


def field(path: Sequence[str]) -> str | None:
    return ITEM.get(path[0]) if len(path) == 1 else label_field(LABELS, path)


@pytest.mark.parametrize(
    "filters",
    [
        [],
        [""],
        ["name"],
        ["name==docker.io/library/busybox:latest"],
        ["id==web-1,labels.app==web"],
        ["id==other", "labels.app==web"],
        ["id!=web-2"],
        ["missing!=x"],
        ["name~=busybox"],
        [r'name~="^docker\\.io/"'],
        [r"name~=|^docker\.io/.*:latest$|"],
        [r"name~=/docker\.io\/library/"],
        ['labels."io.kubernetes.pod"=="a b"'],
        ["labels.io.kubernetes.pod"],
        [' id == "web-1" , labels.app == web '],
        ['id=="\\x77eb-1"'],
    ],
)
def test_filter_matches(filters: list[str]) -> None:
    assert compile_filters(filters)(field)


@pytest.mark.parametrize(
    "filters",
    [["missing"], ["id==web"], ["id==web-1,labels.app==db"], ["id!=web-1"], ["name~=^busybox"], ["labels.none~=.*"]],
)
def test_filter_does_not_match(filters: list[str]) -> None:
    assert not compile_filters(filters)(field)


@pytest.mark.parametrize(
    "text",
    ["==x", "name==", "name=x", "name==x,", 'name=="x', "name~=(", 'name=="\\q"', ",", "a b", "name==a b", "a." * 3000],
)
def test_unreadable_filter_is_invalid_argument(text: str) -> None:
    with pytest.raises(InvalidArgument):
        compile_filters([text])


@pytest.mark.parametrize(
    ("expression", "text"),
    [("(a+)+$", "a" * 4000 + "!"), ("(a|aa)+$", "a" * 4000 + "!"), ("(x+x+)+y", "x" * 4000), ("(.*)*=", "é" * 4000)],
)
def test_no_expression_takes_long_whatever_it_is_matched_with(expression: str, text: str) -> None:
    began = time.perf_counter()
    assert not compile_filters([f'id~="{expression}"'])(lambda _: text)
    assert time.perf_counter() - began < 0.25


@pytest.mark.parametrize("text", ["(a{1000}){1000}", r"(a)\1", "(?=a)b", "(?P<n", "\\xff("])
def test_expressions_that_go_does_not_have_either_are_invalid_argument(text: str) -> None:
    with pytest.raises(InvalidArgument, match="no regular expression"):
        compile_filters([f"id~=|{text}|"])


def test_filters_of_one_request_are_bounded_together() -> None:
    assert compile_filters(["id~=^web"] * 64)(field)
    for filters in (["id~=^web"] * 65, ["id==" + "x" * 4000] * 9, ["id"] * 257, [",".join(["id~=x"] * 65)]):
        with pytest.raises(InvalidArgument):
            compile_filters(filters)
