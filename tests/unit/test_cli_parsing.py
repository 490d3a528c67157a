"""What people write on the command line, and what becomes of it."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta

import pytest
from shoal_bus.api.runtime import RunTask
from shoal_bus.errors import BY_CODE, Code, FailedPrecondition, InvalidArgument
from shoal_bus.events import Event
from shoal_bus.message import now
from shoal_cli.errors import EXIT_CODES, RUN_FAILED, exit_code, start_exit_code
from shoal_cli.events import Wanted, parse_since, services_of_topics
from shoal_cli.reference import normalise
from shoal_cli.request import environment, labels, network, signal_number
from shoal_cli.run import generated_name


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("team/app", "docker.io/team/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("127.0.0.1:5000/team/app:v1", "127.0.0.1:5000/team/app:v1"),
        ("registry.example/app@sha256:" + "a" * 64, "registry.example/app@sha256:" + "a" * 64),
    ],
)
def test_short_names_get_dockers_defaults(given: str, full: str) -> None:
    assert normalise(given) == full


def test_env_takes_values_from_here_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "value")
    monkeypatch.delenv("NOT_HERE", raising=False)
    assert environment(["A=1", "EMPTY=", "HERE", "NOT_HERE"]) == ["A=1", "EMPTY=", "HERE=value"]


@pytest.mark.parametrize("entry", ["", "=value"])
def test_env_without_a_key_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument):
        environment([entry])


@pytest.mark.parametrize("entry", ["", "key", "=value"])
def test_a_label_is_key_and_value(entry: str) -> None:
    assert labels(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(InvalidArgument):
        labels([entry])


def test_bridge_needs_an_address_and_nothing_else_takes_one() -> None:
    assert network("none", "", "", "shoal0") == {"mode": "none"}
    assert network("bridge", "10.1.0.2/24", "10.1.0.1", "br0")["address"] == "10.1.0.2/24"
    for wrong in (
        ("bridge", "", "", "br0"),
        ("host", "10.1.0.2/24", "", "br0"),
        ("none", "", "10.1.0.1", ""),
        ("vlan", "", "", ""),
    ):
        with pytest.raises(InvalidArgument):
            network(*wrong)


@pytest.mark.parametrize("given", ["TERM", "SIGTERM", "term", "15"])
def test_a_signal_has_a_name_or_a_number(given: str) -> None:
    assert signal_number(given) == signal.SIGTERM


@pytest.mark.parametrize("given", ["", "0", "65", "-1", "NOPE", "SIGSIGTERM", "_DFL"])
def test_what_is_no_signal_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgument):
        signal_number(given)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("1.5s", 1.5)]
)
def test_since_takes_how_long_ago(text: str, seconds: float) -> None:
    parsed = parse_since(text)
    assert parsed is not None
    assert abs(now() - timedelta(seconds=seconds) - parsed) < timedelta(seconds=5)


def test_since_takes_a_time() -> None:
    assert parse_since("2026-01-31T12:00:00Z") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_since("2026-01-31T13:00:00+01:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_since("") is None


@pytest.mark.parametrize("text", ["10", "m", "yesterday", "10 m", "-5m"])
def test_since_refuses_what_is_neither(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_since(text)


def test_every_topic_has_one_service() -> None:
    known = services_of_topics()
    assert known["/tasks/exit"] == "runtime"
    assert known["/images/create"] == "content"


def test_event_filters_become_the_narrowest_subjects() -> None:
    wanted = Wanted.parse(
        ["topic=/tasks/exit", "topic=tasks/start", "id=web-1"], "default", all_namespaces=False, all_nodes=False
    )
    assert wanted.patterns("edge-7") == [
        "shoal.v1.edge-7.default.event.runtime.tasks.exit.web-1",
        "shoal.v1.edge-7.default.event.runtime.tasks.start.web-1",
    ]
    everything = Wanted.parse([], "default", all_namespaces=True, all_nodes=True)
    assert everything.patterns("edge-7") == ["shoal.v1.*.*.event.>"]


def test_event_filters_by_id_look_at_the_event() -> None:
    wanted = Wanted.parse(["id=web-1"], "default", all_namespaces=False, all_nodes=False)
    event = Event(node="n", namespace="default", service="runtime", topic="/tasks/exit", id="web-1", timestamp=now())
    assert wanted.matches(event)
    assert not wanted.matches(event.model_copy(update={"id": "web-2"}))


@pytest.mark.parametrize("entry", ["topic", "topic=", "colour=red", ""])
def test_a_filter_that_is_none_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument):
        Wanted.parse([entry], "default", all_namespaces=False, all_nodes=False)


def test_an_unknown_topic_is_refused_with_the_known_ones() -> None:
    wanted = Wanted.parse(["topic=/tasks/ends"], "default", all_namespaces=False, all_nodes=False)
    with pytest.raises(InvalidArgument, match="/tasks/exit"):
        wanted.patterns("n")


def test_generated_names_are_valid_and_differ() -> None:
    names = {generated_name() for _ in range(200)}
    assert len(names) > 190
    for name in names:
        RunTask(id=name, image="busybox")


def test_every_error_has_an_exit_code_that_none_of_shells_own_is() -> None:
    for code, kind in BY_CODE.items():
        assert code is Code.OK or 1 <= exit_code(kind("x")) < RUN_FAILED
    assert EXIT_CODES[Code.NOT_FOUND] == 4


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (
            'OCI runtime create failed: unable to start: exec: "x": executable file not found in $PATH',
            127,
        ),
        (
            'OCI runtime create failed: unable to start: exec: "/x": stat /x: no such file or directory',
            127,
        ),
        ('OCI runtime exec failed: unable to start container process: exec: "/x": permission denied', 126),
        ("OCI runtime create failed: executable file `x` not found in $PATH: No such file or directory", 127),
        ("OCI runtime exec failed: executable file `/x` not found: No such file or directory", 127),
        ("OCI runtime create failed: open executable: Permission denied", 126),
        (
            'OCI runtime exec failed: chdir to cwd ("/x") set in config.json failed: no such file or directory',
            RUN_FAILED,
        ),
        ("container web-1: its task is stopped, an exec needs a running one", RUN_FAILED),
    ],
)
def test_a_command_that_cannot_be_run_has_a_shells_status(words: str, status: int) -> None:
    assert start_exit_code(FailedPrecondition(words)) == status
