"""The `shoal` command as a process, where it needs no node."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest


def shoal(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    return subprocess.run(
        [sys.executable, "-I", "-m", "shoal_cli", *arguments],
        env=clean | {"COLUMNS": "120"} | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_version_is_quick() -> None:
    shoal("version")
    began = time.monotonic()
    done = shoal("version")
    assert done.stdout.startswith("shoal ")
    assert time.monotonic() - began < 1.0
    assert json.loads(shoal("version", "--json").stdout)["version"]
    assert shoal("--version").stdout == done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("ps", "--nonsense"),
        ("run",),
        ("network",),
        ("kill", "--signal", "NOPE", "web-1"),
        ("events", "--filter", "colour=red"),
        ("up", "--log-level", "loud"),
        ("ps", "--namespace", "not/one"),
    ],
)
def test_a_mistake_in_the_usage_is_one_line_and_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = shoal(*arguments, SHOAL_STATE=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("shoal: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_without_a_node_it_says_how_to_start_one(tmp_path: Path) -> None:
    done = shoal("ps", "--state", str(tmp_path))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "shoal up" in done.stderr


def test_run_exits_with_125_when_shoal_itself_fails(tmp_path: Path) -> None:
    done = shoal("run", "--state", str(tmp_path), "busybox")
    assert done.returncode == 125
    done = shoal("run", "--net", "bridge", "busybox")
    assert done.returncode == 125
    assert "--ip" in done.stderr


def test_an_unreachable_bus_is_unavailable() -> None:
    done = shoal("images", "--nats-url", "nats://127.0.0.1:1", "--node", "n")
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unusable_address_is_refused_without_showing_its_password() -> None:
    done = shoal("images", "--nats-url", "http://user:hunter2@127.0.0.1:4222")
    assert done.returncode == 2
    assert "hunter2" not in done.stderr


def test_up_without_root_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-I",
        "-m",
        "shoal_cli",
        "up",
        "--root",
        str(tmp_path / "r"),
        "--state",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6
    assert "PERMISSION_DENIED" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_are_for_this_command(shell: str) -> None:
    script = shoal("completion", shell)
    assert script.returncode == 0
    assert "_SHOAL_COMPLETE" in script.stdout


def test_bash_completes_commands_and_options() -> None:
    done = shoal(_SHOAL_COMPLETE="complete_bash", COMP_WORDS="shoal netw", COMP_CWORD="1")
    assert done.stdout.split() == ["network"]
    done = shoal(_SHOAL_COMPLETE="complete_bash", COMP_WORDS="shoal pull --pla", COMP_CWORD="2")
    assert set(done.stdout.split()) == {"--platform", "--plain-http"}


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = shoal("--help").stdout
    commands = (
        "up containerd nodes version completion pull images rmi run ps kill stop rm inspect exec attach pause resume"
        " update checkpoint stats top events network"
    )
    for name in commands.split():
        assert name in text
    assert "Exit codes" in text


def test_help_is_as_wide_as_the_terminal() -> None:
    text = shoal("attach", "--help", COLUMNS="100").stdout
    paragraph = text.split("exits with its status.")[1].split("Arguments")[0]
    lines = [line.strip() for line in paragraph.splitlines() if line.strip(" ─╭")]
    assert all(len(line) > 75 for line in lines[:-1]), lines


def test_an_attached_terminal_is_left_as_it_was(tmp_path: Path) -> None:
    import termios

    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    done = subprocess.run(
        [sys.executable, "-I", "-m", "shoal_cli", "run", "-t", "--state", str(tmp_path), "busybox"],
        stdin=child, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 125
    assert termios.tcgetattr(child) == before
    os.close(parent)
    os.close(child)
