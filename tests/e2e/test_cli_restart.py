"""`shoal run --restart`, and what `stop`, `kill`, `start`, `ps` and `inspect` have to do with it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from tests.e2e.shoal import Shoal
from tests.e2e.test_cli_run import events_of, name, one_line


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def topics(node: Shoal, id: str) -> list[str]:
    return [event["topic"] for event in events_of(node, id)]


def inspect(node: Shoal, id: str) -> dict[str, Any]:
    found: dict[str, Any] = node.json("inspect", id)
    return found


def test_a_container_that_fails_is_started_again_as_often_as_was_asked(node: Shoal, image: str) -> None:
    id, log = name(), node.directory / f"log-{secrets.token_hex(4)}"
    node.ok(
        "run", "-d", "--name", id, "--restart", "on-failure:2", "--label", f"containerd.io/restart.loguri=file://{log}",
        image, "sh", "-c", "echo again; exit 3",
    )  # fmt: skip
    wait_until(lambda: topics(node, id).count("/tasks/exit") == 3, "it is tried twice")
    assert inspect(node, id)["restart"] == {
        "policy": "on-failure:2", "desired_status": "running", "count": 2, "explicitly_stopped": False,
        "log_uri": f"file://{log}",
    }  # fmt: skip
    assert log.read_text() == "again\nagain\n"
    assert node.json("ps") == []
    assert "exited (3)" in node.ok("ps", "--all")
    node.ok("rm", id)


def test_a_container_with_a_terminal_has_one_again_though_nobody_is_at_it(node: Shoal, image: str) -> None:
    id = name()
    script = "test -t 0 && test -t 1 && exit 3; exit 4"
    node.ok("run", "-d", "-t", "--name", id, "--restart", "on-failure:1", image, "sh", "-c", script)
    wait_until(lambda: topics(node, id).count("/tasks/exit") == 2, "it is tried again")
    exits = [event["payload"]["exit_status"] for event in events_of(node, id) if event["topic"] == "/tasks/exit"]
    assert exits == [3, 3]
    node.ok("rm", id)


def test_a_container_that_ends_at_once_and_always_is_shown_as_restarting(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, "--restart", "always", image, "sh", "-c", "exit 3")
    wait_until(lambda: "restarting (3)" in node.ok("ps"), "ps says so")
    assert id in [container["id"] for container in node.json("ps")]
    node.ok("rm", "-f", id)
    assert node.json("ps", "--all") == []


def test_what_is_stopped_stays_so_whatever_its_policy_until_it_is_started(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, "--restart", "always", image, "sleep", "300")
    first = inspect(node, id)["task"]["pid"]
    node.ok("stop", "--time", "0.2", id)
    assert "exited (137)" in node.ok("ps", "--all")
    assert inspect(node, id)["restart"]["desired_status"] == "stopped"
    node.ok("start", id)
    started = inspect(node, id)
    assert started["task"]["status"] == "running"
    assert started["task"]["pid"] != first
    assert started["restart"] == {
        "policy": "always", "desired_status": "running", "count": 0, "explicitly_stopped": False, "log_uri": "",
    }  # fmt: skip
    one_line(node.run("start", id), 7, "FAILED_PRECONDITION")
    node.ok("rm", "-f", id)
    one_line(node.run("start", id), 4, "NOT_FOUND")
    one_line(node.run("stop", id), 4, "NOT_FOUND")


def test_a_kill_is_a_stop_for_unless_stopped(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, "--restart", "unless-stopped", image, "sleep", "300")
    node.ok("kill", "-s", "HUP", id)
    assert inspect(node, id)["restart"]["explicitly_stopped"] is False
    node.ok("kill", id)
    wait_until(lambda: "exited (137)" in node.ok("ps", "--all"), "it has ended")
    restart = inspect(node, id)["restart"]
    assert (restart["explicitly_stopped"], restart["desired_status"]) == (True, "running")
    node.ok("rm", id)


def test_a_run_in_front_of_us_ends_with_its_own_process_and_says_that_there_will_be_others(
    node: Shoal, image: str
) -> None:
    id = name()
    done = node.run("run", "--name", id, "--restart", "unless-stopped", image, "sh", "-c", "echo out; exit 9")
    assert (done.returncode, done.stdout) == (9, "out\n")
    assert "started again by its restart policy" in done.stderr
    wait_until(lambda: "/tasks/delete" in topics(node, id), "it is started again")
    node.ok("stop", id)
    node.ok("rm", id)


def test_a_container_without_a_policy_is_started_again_by_hand(node: Shoal, image: str) -> None:
    id = name()
    node.ok("run", "-d", "--name", id, image, "sh", "-c", "echo x >> /x; test $(wc -l < /x) = 2")
    wait_until(lambda: "exited (1)" in node.ok("ps", "--all"), "it ends")
    assert inspect(node, id)["restart"] is None
    node.ok("start", id)
    wait_until(lambda: "exited (0)" in node.ok("ps", "--all"), "it ends anew, in the snapshot it had")
    assert inspect(node, id)["restart"] is None
    node.ok("rm", id)


def test_policies_that_cannot_be_are_refused_with_what_can(node: Shoal, image: str) -> None:
    bad = node.run("run", "-d", "--restart", "sometimes", image)
    one_line(bad, 125, "INVALID_ARGUMENT")
    assert "must be no, always, unless-stopped or on-failure[:N]" in bad.stderr
    one_line(node.run("run", "-d", "--restart", "always:3", image), 125, "INVALID_ARGUMENT")
    one_line(node.run("run", "-d", "--rm", "--restart", "always", image), 125, "INVALID_ARGUMENT")
    assert node.json("ps", "--all") == []
