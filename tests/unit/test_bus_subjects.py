"""Subjects: what is built is parsed back, and what can't be one is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_bus import subjects
from shoal_bus.errors import InvalidArgument

text = st.text(min_size=1, max_size=60).filter(lambda s: not any(0xD800 <= ord(c) < 0xE000 for c in s))
name = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True).filter(
    lambda s: s not in ("event", "command", "copies")
)
node = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)


@given(text)
def test_token_decodes_to_what_was_encoded(value: str) -> None:
    token = subjects.encode(value)
    assert subjects.decode(token) == value
    assert token.isascii()
    assert not set(token) & set(". *>\t\r\n")
    assert token not in (subjects.WHOLE_NODE, subjects.ALL_NODES)


@given(node, text, name, name, name)
def test_request_is_parsed_back(node: str, namespace: str, service: str, resource: str, verb: str) -> None:
    subject = subjects.request(node, namespace, service, resource, verb)
    assert subjects.parse(subject) == subjects.Request(node, namespace, service, resource, verb)


@given(node, text, name, name, name)
def test_command_is_parsed_back(node: str, namespace: str, service: str, resource: str, verb: str) -> None:
    subject = subjects.command(node, namespace, service, resource, verb)
    assert subjects.parse(subject) == subjects.Command(node, namespace, service, resource, verb)


@given(node, text, name, st.lists(name, min_size=1, max_size=3), st.one_of(st.just(""), text))
def test_event_is_parsed_back(node: str, namespace: str, service: str, words: list[str], id: str) -> None:
    topic = "/" + "/".join(words)
    subject = subjects.event(node, namespace, service, topic, id)
    assert subjects.parse(subject) == subjects.Event(node, namespace, service, topic, id)


@pytest.mark.parametrize("id", ["ä" * 1000, "." * 4096, "x" * 5000])
def test_an_id_that_is_too_long_for_the_server_is_its_digest(id: str) -> None:
    subject = subjects.event("n", "x" * 76, "content", "/images/create", id)
    assert len(subject) < subjects.LONGEST
    told = subjects.parse(subject)
    assert isinstance(told, subjects.Event)
    assert told.id == f"sha256:{hashlib.sha256(id.encode()).hexdigest()}"
    assert subjects.event_pattern("n", "x" * 76, "content", "/images/create", id) == subject
    with pytest.raises(InvalidArgument):
        subjects.request("n", "default", id.lower(), "snapshot", "prepare")


@pytest.mark.parametrize("bad", ["", "A", "a.b", "a_b", "x" * 64, "*", ">", "ä", "a b", "a\n"])
def test_node_name_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        subjects.check_node(bad)
    with pytest.raises(InvalidArgument):
        subjects.request(bad, "default", "runtime", "task", "start")


@pytest.mark.parametrize("token", ["%61", "%5f", "a%2e", "%", "%FF", "a.b", "*", "_", "_all", "a b", "ä"])
def test_token_that_encode_does_not_make_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument):
        subjects.decode(token)


@pytest.mark.parametrize(
    "subject",
    [
        "shoal.v1", "shoal.v1.n", "shoal.v2.n.default.runtime.task.start", "shoal.v1.n..runtime.task.start",
        "shoal.v1.n.*.runtime.task.start", "shoal.v1.n.default.>", "shoal.v1.N.default.runtime.task.start",
        "shoal.v1.n.default.event.runtime.web-1", "shoal.v1.n.default.runtime.task.start.more", "",
    ],
)  # fmt: skip
def test_subject_that_is_none_of_ours_is_refused(subject: str) -> None:
    with pytest.raises(InvalidArgument):
        subjects.parse(subject)


@pytest.mark.parametrize("service", ["event", "command", "copies", "", "*", "a.b", "A"])
def test_reserved_or_malformed_service_is_refused(service: str) -> None:
    with pytest.raises(InvalidArgument):
        subjects.request("n", "default", service, "task", "start")


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        subjects.encode("\ud800")


def test_whole_node_and_all_nodes_are_tokens_of_their_own() -> None:
    assert subjects.request("_all", "_", "content", "namespace", "list") == "shoal.v1._all._.content.namespace.list"
    assert subjects.event("n", "_", "content", "/namespaces/create") == "shoal.v1.n._.event.content.namespaces.create._"
