"""Containerd's filter language, as `ctr` users write it."""

from __future__ import annotations

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
