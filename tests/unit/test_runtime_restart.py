"""Restart policies: what labels say, and what is done with a container when."""

from __future__ import annotations

from typing import Any

import pytest
from shoal_bus import restart
from shoal_bus.api.runtime import RunTask
from shoal_bus.errors import InvalidArgument
from shoal_bus.restart import Policy
from shoal_bus.types import Stdio
from shoal_runtime.restart.decision import FIRST_PAUSE_SECONDS, Decision, Look, decide, next_pause
from shoal_runtime.restart.start import streams

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("no", Policy("no")),
        ("always", Policy("always")),
        ("unless-stopped", Policy("unless-stopped")),
        ("on-failure", Policy("on-failure")),
        ("on-failure:0", Policy("on-failure")),
        ("on-failure:10", Policy("on-failure", 10)),
    ],
)
def test_a_policy_is_read_and_written(text: str, policy: Policy) -> None:
    assert Policy.parse(text) == policy
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sometimes", "must be no, always, unless-stopped or on-failure"),
        ("", "must be no"),
        ("Always", "must be no"),
        ("always:3", "only on-failure takes a number"),
        ("on-failure:", "'' is not a number"),
        ("on-failure:-1", "'-1' is not a number"),
        ("on-failure:many", "'many' is not a number"),
        ("on-failure:1:2", "'1:2' is not a number"),
        ("on-failure:²", "is not a number"),
    ],
)
def test_a_bad_policy_is_refused_with_what_is_allowed(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Policy.parse(text)
    with pytest.raises(InvalidArgument, match="restart"):
        RunTask.of({"id": "one", "image": "one", "restart": text})


def test_what_is_removed_at_its_exit_has_no_policy() -> None:
    with pytest.raises(InvalidArgument, match="can't be started again"):
        RunTask.of({"id": "one", "image": "one", "restart": "always", "remove": True})
    RunTask.of({"id": "one", "image": "one", "restart": "no", "remove": True})


def labels(policy: str | None = None, **more: str) -> dict[str, str]:
    found = {restart.STATUS: restart.RUNNING} | {f"containerd.io/restart.{key}": value for key, value in more.items()}
    return found | ({restart.POLICY: policy} if policy is not None else {})


@pytest.mark.parametrize(
    ("given", "exit_status", "wanted"),
    [
        (labels(), 0, True),  # containerd's default
        (labels(""), 0, True),
        (labels("always"), 0, True),
        (labels("always", **{"explicitly-stopped": "true"}), 137, True),
        (labels("always:3"), 1, False),
        (labels("sometimes"), 1, False),
        (labels("no"), 1, False),
        (labels("unless-stopped"), 0, True),
        (labels("unless-stopped", **{"explicitly-stopped": "false"}), 0, True),
        (labels("unless-stopped", **{"explicitly-stopped": "true"}), 0, False),
        (labels("unless-stopped", **{"explicitly-stopped": "1"}), 0, False),
        (labels("on-failure"), 0, False),
        (labels("on-failure", count="1000"), 1, True),
        (labels("on-failure:2"), 1, True),
        (labels("on-failure:2", count="1"), 1, True),
        (labels("on-failure:2", count="2"), 1, False),
        (labels("on-failure:2", count="many"), 1, False),
        (labels("on-failure:2", **{"explicitly-stopped": "true"}), 137, True),
        (labels("always", status="stopped"), 1, False),
        (labels("always", status="created"), 1, False),
        ({restart.POLICY: "always"}, 1, False),
        ({}, 1, False),
    ],
)
def test_containerds_rules(given: dict[str, str], exit_status: int, wanted: bool) -> None:
    assert restart.is_wanted_again(given, exit_status) is wanted


def test_a_count_that_is_no_number_is_none() -> None:
    assert restart.count_of(labels(count="7")) == 7
    assert restart.count_of(labels(count="many")) == restart.count_of(labels()) == 0


def look(policy: str = "always", **more: Any) -> Look:
    return Look("default", "one", more.pop("labels", labels(policy)), **more)


def at(found: Decision | None) -> float:
    assert found is not None
    assert found.action == "start"
    return round(found.at - NOW, 3)


def test_an_exit_is_acted_on_at_once_and_ever_later_while_it_comes_again() -> None:
    first = look(status="stopped", exited_at=NOW)
    assert at(decide(first, since=NOW)) == FIRST_PAUSE_SECONDS
    pauses, pause = [], 0.0
    for _ in range(9):
        again = look(status="stopped", exited_at=NOW, began_at=NOW - 1, pause=pause)
        pause = next_pause(again, 10)
        assert at(decide(again, since=NOW)) == pytest.approx(pause)
        pauses.append(pause)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    ran = look(status="stopped", exited_at=NOW, began_at=NOW - 10, pause=10.0)
    assert at(decide(ran, since=NOW)) == FIRST_PAUSE_SECONDS


def test_what_a_client_has_signalled_is_left_to_it_for_a_while() -> None:
    assert at(decide(look(status="stopped", exited_at=NOW, killed_at=NOW - 1), since=NOW)) == 9
    assert at(decide(look(status="stopped", exited_at=NOW, killed_at=NOW - 60), since=NOW)) == 0.1
    assert at(decide(look(), since=NOW)) == 10


def test_restarts_that_are_held_wait() -> None:
    assert at(decide(look(status="stopped", exited_at=NOW, held_until=NOW + 60), since=NOW)) == 60


def test_a_clock_that_was_set_back_delays_nothing_for_longer_than_an_interval() -> None:
    assert at(decide(look(status="stopped", exited_at=NOW + 86400), since=NOW)) == 10


def test_a_start_that_came_to_nothing_is_a_failure() -> None:
    failed = look("on-failure:2", failed_at=NOW, began_at=NOW - 1, pause=0.4)
    assert at(decide(failed, since=NOW)) == 0.8
    assert decide(look("on-failure:2"), since=NOW) is None  # a client has deleted its task
    since = look("on-failure:2", failed_at=NOW - 5, status="stopped", exit_status=0, exited_at=NOW)
    assert decide(since, since=NOW) is None


@pytest.mark.parametrize("status", ["creating", "created", "running", "paused"])
def test_what_is_there_is_not_started(status: str) -> None:
    assert decide(look(status=status), since=NOW) is None


@pytest.mark.parametrize(
    ("status", "stops"), [("running", True), ("paused", True), ("created", True), ("stopped", False), ("", False)]
)
def test_what_is_to_be_stopped_is(status: str, stops: bool) -> None:
    found = decide(look(status=status, labels=labels("always", status="stopped")), since=NOW)
    assert found == (Decision("stop", NOW + 10) if stops else None)


def test_output_goes_to_the_log_uri_or_where_it_lasts() -> None:
    before = Stdio(stdin="/fifo/in", stdout="file:///out", stderr="/fifo/err")
    uri = restart.log_uri_of(labels(loguri="binary:///log?a=b"))
    assert streams(uri, before, terminal=False) == Stdio(stdout=uri, stderr=uri)
    assert streams(uri, before, terminal=True) == Stdio(stdout=uri, terminal=True)
    assert streams("", before, terminal=False) == Stdio(stdout="file:///out")
    assert streams("", Stdio(stdout="/fifo", terminal=True), terminal=True) == Stdio(terminal=True)
    assert restart.log_uri_of(labels(logpath="/var/log/one")) == "file:///var/log/one"
    assert restart.log_uri_of(labels(logpath="/var/log/one", loguri="file:///two")) == "file:///two"
