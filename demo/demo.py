"""`make demo`: from an empty directory to a running container and its events, and back to nothing.

A registry and a node are started on loopback; an image made of busybox-static is pushed, pulled by shoal and run; a
subscriber of its own prints what it was told. At the end nothing may be left: no process, mount, network namespace,
cgroup or directory. Whatever isn't as it must be ends the demo with an error.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image import push
from world import World

SHOAL = Path(__file__).resolve().parent.parent / "bin" / "shoal"
EXPECTED = ["/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete"]
"""What a run with --rm tells of its container, in this order."""
_START_SECONDS, _EVENT_SECONDS = 60.0, 10.0


class Failed(Exception):
    """Something isn't as it must be."""


def say(text: str) -> None:
    print(f"\n\x1b[1m== {text}\x1b[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def main() -> int:
    if os.geteuid() != 0:
        print("demo: must run as root: namespaces, mounts and cgroups are made", file=sys.stderr)
        return 1
    tag = secrets.token_hex(3)
    container = f"hello-{tag}"
    directory = Path(tempfile.mkdtemp(prefix=f"shoal-demo-{tag}-", dir="/var/tmp"))
    world = World(tag)
    try:
        try:
            demonstrate(directory, container)
        finally:
            shutil.rmtree(directory)
        left = world.left()
        if left or directory.exists():
            raise Failed("left behind:\n  " + "\n  ".join(left or [str(directory)]))
    except Failed as error:
        print(f"\ndemo: FAILED: {error}", file=sys.stderr)
        return 1
    say("all gone again: no process, mount, network namespace, cgroup or directory is left")
    return 0


def demonstrate(directory: Path, container: str) -> None:
    """The demonstration itself; everything it starts is stopped when it returns."""
    with ExitStack() as stack:
        say("a registry on loopback, and a small image of busybox-static in it")
        registry = stack.enter_context(running_registry(directory / "registry"))
        image = f"{registry}/demo/busybox:latest"
        push(registry, "demo/busybox", "latest")
        print(image)

        say("a node: nats-server and five services")
        stack.enter_context(running_node(directory))
        shoal(directory, "nodes")

        received = directory / "events.jsonl"
        subscriber = stack.enter_context(subscribed(directory, received))

        say(f"shoal pull {image}")
        shoal(directory, "pull", image)
        shoal(directory, "images")

        say(f"shoal run --rm --name {container} {image} …")
        script = 'echo "hello from $(hostname), process $$ on $(uname -s)"; exit 7'
        output = shoal(directory, "run", "--rm", "--name", container, image, "sh", "-c", script, status=7)
        if output.strip() != f"hello from {container}, process 1 on Linux":
            raise Failed(f"the container said {output!r}")
        print("(it exited with 7, and so did `shoal run`)")

        say("what the subscriber received")
        topics = wait_for_events(received, container)
        if topics != EXPECTED:
            raise Failed(f"the events of {container} are {topics}, not {EXPECTED}")

        say("everything is removed and stopped")
        if container in shoal(directory, "ps", "--all"):
            raise Failed(f"the container {container} is left")
        shoal(directory, "rmi", image)
        stop(subscriber, signal.SIGTERM)


def shoal(directory: Path, *arguments: str, status: int = 0) -> str:
    """Runs a command of shoal's, shows what it prints and returns that; it must exit with `status`."""
    done = subprocess.run(
        [SHOAL, *arguments], env=environment(directory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        timeout=120, check=False,
    )  # fmt: skip
    output = done.stdout.decode(errors="replace")
    print(output, end="", flush=True)
    if done.returncode != status:
        raise Failed(f"shoal {' '.join(arguments)}: exited with {done.returncode}, not {status}")
    return output


def environment(directory: Path) -> dict[str, str]:
    """Our environment, with the node's own state directory and without what would lead somewhere else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    return kept | {"SHOAL_STATE": str(directory / "state")}


@contextmanager
def running_registry(directory: Path) -> Iterator[str]:
    """docker-registry on a free port of loopback: its host:port."""
    binary = shutil.which("docker-registry")
    if binary is None:
        raise Failed("docker-registry isn't there: apt-get install docker-registry")
    directory.mkdir()
    host = f"127.0.0.1:{free_port()}"
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\nhttp: {{addr: '{host}', secret: demo}}\n"
    )
    log = directory / "registry.log"
    with log.open("wb") as out:
        process = subprocess.Popen([binary, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        wait_until(lambda: answers(f"http://{host}/v2/"), process, log)
        yield host
    finally:
        stop(process, signal.SIGTERM)


@contextmanager
def running_node(directory: Path) -> Iterator[None]:
    """`shoal up` with root and state directories of its own; stopped as by Ctrl-C."""
    log = directory / "node.log"
    command = [str(SHOAL), "up", "--node", "demo", "--stop-containers"]
    command += ["--root", str(directory / "root"), "--state", str(directory / "state")]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: b'"node.up"' in log.read_bytes(), process, log)
        yield
    except Failed:
        print(log.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        stop(process, signal.SIGINT)
    if process.returncode != 0:
        raise Failed(f"shoal up exited with {process.returncode}:\n{log.read_text()[-4000:]}")


@contextmanager
def subscribed(directory: Path, received: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`shoal events` in a process of its own, writing what it receives to a file."""
    with received.open("wb") as out:
        # From a time, so that nothing is missed while it starts.
        process = subprocess.Popen(
            [SHOAL, "events", "--json", "--since", "10s"],
            env=environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=out,
        )
    try:
        yield process
    finally:
        stop(process, signal.SIGTERM)


def wait_for_events(received: Path, container: str) -> list[str]:
    """Shows the subscriber's events once the last one of the container is there; returns the container's topics."""
    deadline = time.monotonic() + _EVENT_SECONDS
    while True:
        events = [json.loads(line) for line in received.read_text().splitlines(keepends=True) if line.endswith("\n")]
        ours = [event["topic"] for event in events if event["id"] == container and event["service"] == "runtime"]
        if EXPECTED[-1] in ours or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for event in events:
        print(f"{event['timestamp']}  {event['service']:<8}  {event['topic']:<20}  {event['id'][:60]}")
    return ours


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signals a process and waits for its end; one that doesn't end is killed, which is an error."""
    if process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed(f"process {process.pid} didn't stop on {number.name}") from None


def wait_until(ready: object, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when `ready()` is true; fails with the process's last words when it ends before."""
    assert callable(ready)
    deadline = time.monotonic() + _START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{log.stem} didn't start:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
