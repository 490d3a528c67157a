"""`shoal stats` and `shoal top`, as a person at a shell and a program have them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import secrets
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.shoal import Shoal

HEAD = ["CONTAINER", "CPU %", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS"]


@pytest.fixture
def run(node: Shoal, image: str) -> Iterator[Callable[..., str]]:
    """Runs a command in a container of its own, which goes with the test."""
    made: list[str] = []

    def begin(*command: str) -> str:
        id = f"stats-{secrets.token_hex(4)}"
        node.ok("run", "-d", "--name", id, image, *command)
        made.append(id)
        return id

    yield begin
    if made:
        node.ok("rm", "--force", *made)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What `condition()` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_pipe_gets_one_table(node: Shoal, run: Callable[..., str]) -> None:
    busy, idle = run("sh", "-c", "while :; do :; done"), run("sleep", "600")
    printed = node.ok("stats").splitlines()
    assert cells(printed[0]) == HEAD
    rows = {row[0]: row for row in map(cells, printed[1:])}
    assert rows.keys() >= {busy, idle}
    assert all(row[1].endswith("%") and row[3].endswith("%") for row in rows.values())
    assert float(rows[busy][1].rstrip("%")) > float(rows[idle][1].rstrip("%"))
    assert rows[idle][2].count("iB") == 2
    assert rows[idle][5] == "1"
    assert "\x1b" not in "".join(printed)


def test_a_program_gets_numbers_of_the_containers_it_names(node: Shoal, run: Callable[..., str]) -> None:
    busy, _ = run("sh", "-c", "while :; do :; done"), run("sleep", "600")
    [found] = node.json("stats", busy, "--interval", "0.5")
    assert found["container_id"] == busy
    assert 5 < found["cpu_percent"] < 150
    assert 0 < found["memory"]["usage"] < found["memory"]["limit"]
    assert found["memory"]["percent"] == pytest.approx(100 * found["memory"]["usage"] / found["memory"]["limit"])
    assert found["block_io"].keys() == {"read", "write"}
    assert found["pids"]["current"] == 1


def test_a_stream_of_json_goes_on_until_the_containers_named_have_ended(node: Shoal, run: Callable[..., str]) -> None:
    id = run("sleep", "600")
    process = node.spawn("stats", "--stream", "--json", "--interval", "0.2", id, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        [found] = json.loads(process.stdout.readline())
        assert found["container_id"] == id
        assert found["cpu_percent"] is not None
    node.ok("kill", id)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_terminal_has_it_live_until_interrupted(node: Shoal, run: Callable[..., str]) -> None:
    id = run("sleep", "600")
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
    process = node.spawn("stats", "--interval", "0.2", stdin=child, stdout=child, stderr=subprocess.PIPE)
    os.close(child)
    shown = b""
    deadline = time.monotonic() + 30
    # One look is one mention of the container; the third one has had CPU time to tell of.
    while shown.count(id.encode()) < 3 and time.monotonic() < deadline:
        if select.select([parent], [], [], 1)[0]:
            shown += os.read(parent, 65536)
    assert shown.count(id.encode()) >= 3
    assert b"\x1b[" in shown
    assert b"%" in shown.split(id.encode())[-1]
    process.send_signal(signal.SIGINT)
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:
            break
    assert process.wait(30) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    os.close(parent)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back


def test_nothing_runs_and_the_table_is_its_head(node: Shoal) -> None:
    assert node.json("stats", "--interval", "0.1") == []
    assert [cells(line) for line in node.ok("stats", "--interval", "0.1").splitlines()] == [HEAD]


@pytest.mark.parametrize("command", ["stats", "top"])
def test_a_container_that_isnt_there_is_not_found(node: Shoal, command: str) -> None:
    done = node.run(command, "nobody")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert "[NOT_FOUND]" in done.stderr


def test_a_stopped_one_has_nothing_to_show(node: Shoal, run: Callable[..., str]) -> None:
    id = run("true")
    eventually(lambda: next(one for one in node.json("ps", "-a") if one["id"] == id)["task"]["status"] == "stopped")
    done = node.run("stats", id)
    assert done.returncode == 7
    assert "has stopped" in done.stderr
    assert id not in node.ok("stats")
    assert node.run("top", id).returncode == 4


def test_a_wrong_interval_is_wrong_usage(node: Shoal) -> None:
    assert node.run("stats", "--interval", "0").returncode == 2


def test_top_lists_every_process_with_its_user_and_its_time(node: Shoal, run: Callable[..., str]) -> None:
    id = run("sh", "-c", "sleep 600 & while :; do :; done")
    [container] = [one for one in node.json("ps") if one["id"] == id]

    def both() -> list[dict[str, Any]] | None:
        listed: list[dict[str, Any]] = node.json("top", id)
        return listed if len(listed) == 2 and max(one["cpu_seconds"] for one in listed) > 0 else None

    found = eventually(both)
    commands = {one["pid"]: one["command"] for one in found}
    assert commands[container["task"]["pid"]].startswith("sh -c sleep 600")
    assert "sleep 600" in commands.values()
    assert {(one["user"], one["uid"]) for one in found} == {("root", 0)}
    printed = node.ok("top", id).splitlines()
    assert printed[0].split() == ["PID", "USER", "TIME", "EXEC", "COMMAND"]
    assert {int(line.split()[0]) for line in printed[1:]} == commands.keys()


def test_top_keeps_a_containers_words_from_the_terminals_controls(node: Shoal, run: Callable[..., str]) -> None:
    id = run("sh", "-c", "sleep 600; : 'x\x1b[2Jy'")
    shown = node.ok("top", id)
    assert "x?[2Jy" in shown
    assert "\x1b" not in shown


def test_top_of_a_node_elsewhere_has_pids_alone(node: Shoal, run: Callable[..., str]) -> None:
    id = run("sleep", "600")
    described = json.loads((node.state / "node.json").read_text())
    address = described["address"]
    host = address["urls"][0].removeprefix("nats://")
    url = f"nats://{address['user']}:{address['password']}@{host}"
    done = node.run("top", "--nats-url", url, "--node", node.node, id)
    assert done.returncode == 0, done.stderr
    [container] = [one for one in node.json("ps") if one["id"] == id]
    assert [line.split() for line in done.stdout.splitlines()] == [["PID", "EXEC"], [str(container["task"]["pid"])]]
