"""`shoal exec`, as a person at a shell and a script have it: further processes, each with streams and a status."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from tests.e2e.shoal import Shoal, eventually, refused, unique

NET_ADMIN = 1 << 12
BOX = "the container's id"


def commands(node: Shoal, id: str) -> list[str]:
    return [process["command"] for process in node.json("top", id)]


def test_its_streams_come_apart_and_its_status_is_ours(node: Shoal, box: str) -> None:
    done = node.run("exec", box, "sh", "-c", "echo to-out; echo to-err >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, "to-out\n", "to-err\n")
    assert node.run("exec", box, "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    assert node.run("exec", box, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_input_goes_in_to_its_end_where_it_is_asked_for(node: Shoal, box: str) -> None:
    data = os.urandom(3_000_000)
    passing = node.spawn("exec", "-i", box, "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert passing.communicate(data, timeout=60)[0] == data
    assert passing.returncode == 0
    assert node.run("exec", "-i", box, "cat", stdin=b"").stdout == ""
    assert node.run("exec", box, "cat", stdin=b"not for it").stdout == ""


def test_who_reads_no_input_is_not_in_the_way_of_who_gives_it(node: Shoal, box: str) -> None:
    done = node.run(
        "exec", "-i", box, "sh", "-c", "read line; exec 0<&-; echo $line; exit 3", stdin=b"first\n" * 100_000
    )
    assert (done.returncode, done.stdout) == (3, "first\n")


def test_options_reach_the_process(node: Shoal, box: str) -> None:
    script = "id -un; id -gn; pwd; echo $GIVEN $FROM_HERE $FROM_IMAGE; test -t 1 || echo no terminal"
    out = node.run(
        "exec", "--user", "user:root", "--cwd", "/tmp", "-e", "GIVEN=1", "-e", "FROM_HERE", "-e", "NOWHERE",
        box, "sh", "-c", script, FROM_HERE="2",
    ).stdout  # fmt: skip
    assert out.splitlines() == ["user", "root", "/tmp", "1 2 yes", "no terminal"]
    assert node.ok("exec", "-u", "4711:42", box, "id") == "uid=4711 gid=42 groups=42\n"
    status = node.ok("exec", box, "cat", "/proc/self/status")
    more = node.ok("exec", "--cap-add", "net_admin", box, "cat", "/proc/self/status")
    held = [int(re.findall(r"CapEff:\s*(\w+)", text)[0], 16) for text in (status, more)]
    assert held[1] == held[0] | NET_ADMIN != held[0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-u", "nobody-here", BOX, "true"], "INVALID_ARGUMENT", ["nobody-here", "/etc/passwd"]),
        (["-w", "relative", BOX, "true"], "INVALID_ARGUMENT", ["cwd", "absolute"]),
        (["-w", "/not/there", BOX, "true"], "FAILED_PRECONDITION", ["/not/there", "no such file or directory"]),
        (["--cap-add", "NONSENSE", BOX, "true"], "INVALID_ARGUMENT", ["CAP_NONSENSE", "capabilities(7)"]),
        (["-e", "=x", BOX, "true"], "INVALID_ARGUMENT", ["--env"]),
        (["-d", "-i", BOX, "true"], "INVALID_ARGUMENT", ["-d"]),
        (["-t", BOX, "true"], "FAILED_PRECONDITION", ["not a terminal"]),
        (["--detach-keys", "ctrl-1", BOX, "true"], "INVALID_ARGUMENT", ["ctrl-1"]),
        (["nobody", "true"], "NOT_FOUND", ["container nobody: not found"]),
    ],
)
def test_what_cannot_be_is_refused(node: Shoal, box: str, arguments: list[str], code: str, words: list[str]) -> None:
    refused(node.run("exec", *(box if one == BOX else one for one in arguments)), 125, code, *words)


def test_a_command_that_cannot_be_run_has_a_shells_status_and_the_runtimes_words(node: Shoal, box: str) -> None:
    for command, status, words in (
        ("nope", 127, 'exec: "nope": executable file not found in $PATH'),
        ("/nope", 127, "no such file or directory"),
        ("/etc/passwd", 126, 'exec: "/etc/passwd": permission denied'),
        ("/etc", 126, "permission denied"),
    ):
        refused(node.run("exec", box, command), status, "FAILED_PRECONDITION", "OCI runtime exec failed: ", words)
    assert commands(node, box) == ["sleep 100000"]


def test_many_at_once_do_not_mix(node: Shoal, box: str) -> None:
    script = 'echo "out $1"; echo "err $1" >&2; cat; exit $1'
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [node.spawn("exec", "-i", box, "sh", "-c", script, "sh", str(n), **pipes) for n in range(1, 13)]
    for number, process in enumerate(running, 1):
        out, err = process.communicate(b"in %d\n" % number, timeout=60)
        assert (process.returncode, out, err) == (number, b"out %d\nin %d\n" % (number, number), b"err %d\n" % number)


def test_signals_are_passed_on(node: Shoal, box: str) -> None:
    script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    running = node.spawn("exec", box, "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.communicate(timeout=30)[0] == b"caught\n"
    assert running.returncode == 5


def test_output_that_nobody_wants_ends_it(node: Shoal, box: str) -> None:
    running = node.spawn("exec", box, "seq", "1", "1000000000", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"1\n"
    running.stdout.close()
    assert running.wait(30) == 128 + signal.SIGPIPE
    assert commands(node, box) == ["sleep 100000"]


def test_what_it_leaves_running_does_not_keep_it(node: Shoal, box: str) -> None:
    done = node.run("exec", box, "sh", "-c", "sleep 3000 & echo $!")
    assert (done.returncode, done.stdout.strip().isdigit()) == (0, True)
    assert node.run("exec", box, "kill", done.stdout.strip()).returncode == 0


def test_what_a_killed_command_leaves_is_cleared_away_by_the_next_one(node: Shoal, box: str) -> None:
    running = node.spawn(
        "exec", box, "sh", "-c", "echo ready; exec sleep 2000", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.kill()
    running.communicate()
    place = node.state / "fifo" / "default" / box
    node.ok("exec", box, "true")
    assert len(list(place.iterdir())) == 1  # it runs on, and may be attached to
    [pid] = [process["pid"] for process in node.json("top", box) if process["command"] == "sleep 2000"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: node.ok("exec", box, "true") == "" and not place.exists())


def test_a_detached_one_is_listed_until_it_ends(node: Shoal, box: str) -> None:
    id = node.ok("exec", "-d", box, "sh", "-c", "while ! test -e /tmp/end; do sleep 0.05; done").strip()
    assert id in [process["exec_id"] for process in node.json("top", box)]
    refused(node.run("attach", "--exec", id, box), 7, "FAILED_PRECONDITION", id, "no streams")
    node.ok("exec", box, "touch", "/tmp/end")
    # And is forgotten then: nobody asks how it ended.
    eventually(lambda: node.run("attach", "--exec", id, box).returncode == 4)


def test_it_ends_with_its_container(node: Shoal, image: str) -> None:
    id = unique("short-lived")
    node.ok("run", "-d", "--name", id, image, "sleep", "1000")
    for ending in (["kill", id], ["rm", "--force", id]):
        running = node.spawn(
            "exec", id, "sh", "-c", "echo ready; sleep 1000", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        node.ok(*ending)
        assert running.communicate(timeout=30) == (b"", b"")
        assert running.returncode == 137
        if ending[0] == "kill":
            refused(node.run("exec", id, "true"), 125, "FAILED_PRECONDITION", "stopped", "running one")
            node.ok("rm", id)
            node.ok("run", "-d", "--name", id, image, "sleep", "1000")
    refused(node.run("exec", id, "true"), 125, "NOT_FOUND", id)
    assert not (node.state / "fifo" / "default" / id).exists()
