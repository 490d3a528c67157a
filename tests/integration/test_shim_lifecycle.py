"""Shims supervise real containers by the real runc: their lives, their streams, and what is left afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from shoal_bus.errors import FailedPrecondition, NotFound, ShoalError, Unimplemented
from shoal_bus.locks import Locks
from shoal_bus.types import Stdio
from shoal_runtime.shim import mounts, protocol
from shoal_runtime.shims import ExitRecord, place_of
from shoal_runtime.supervisor import Supervisor

from tests.support import bundle as bundles
from tests.support.leaks import Leaks, lives
from tests.support.shims import Host, reader_of, running_host, until


@pytest.fixture
async def host(tmp_path: Path, leaks: Leaks) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as running:
        yield running


async def test_exit_status_is_the_process_s_own(host: Host) -> None:
    await host.run("seven", ["sh", "-c", "exit 7"])
    exit = await host.exit_of("seven")
    assert (exit.namespace, exit.exit_status) == ("test", 7)
    deleted = await host.delete("seven")
    assert deleted is not None
    assert deleted.exit_status == 7
    assert mounts.mounts_below(str(host.directory)) == []
    assert list((host.state / "shims").iterdir()) == []


async def test_a_signal_is_128_and_its_number(host: Host) -> None:
    await host.run("killed", ["sleep", "60"])
    await host.supervisor.kill("test", "killed", signal.SIGKILL, False)
    assert (await host.exit_of("killed")).exit_status == 137
    with pytest.raises(NotFound):
        await host.supervisor.kill("test", "killed", signal.SIGKILL, False)


async def test_a_created_container_waits_to_be_started(host: Host) -> None:
    await host.create("waits", ["sh", "-c", "exit 3"])
    await asyncio.sleep(0.2)
    assert (await host.supervisor.state("test", "waits"))["status"] == "created"
    assert host.exits == []
    await host.supervisor.start_task("test", "waits")
    assert (await host.exit_of("waits")).exit_status == 3
    with pytest.raises(FailedPrecondition):
        await host.supervisor.start_task("test", "waits")


async def test_a_created_container_can_be_deleted(host: Host) -> None:
    await host.create("never", ["true"])
    deleted = await host.delete("never")
    assert deleted is not None
    assert deleted.exit_status == 137


async def test_a_running_container_is_deleted_only_by_force(host: Host) -> None:
    await host.run("runs", ["sleep", "60"])
    with pytest.raises(FailedPrecondition, match="running"):
        await host.delete("runs")
    deleted = await host.delete("runs", force=True)
    assert deleted is not None
    assert deleted.exit_status == 137


async def test_a_missing_command_is_told_in_the_runtime_s_words_and_undone(host: Host) -> None:
    with pytest.raises(FailedPrecondition, match="no-such-command"):
        await host.create("bad", ["no-such-command"])
    assert list((host.state / "shims").iterdir()) == []
    assert mounts.mounts_below(str(host.directory)) == []


async def test_a_missing_runtime_is_named(host: Host) -> None:
    with pytest.raises(FailedPrecondition, match="no-such-runtime"):
        await host.create("bad", ["true"], runtime="no-such-runtime")


@pytest.mark.parametrize("step", ["create", "start", "delete"])
async def test_a_runtime_that_fails_is_told_and_leaves_nothing(step: str, host: Host) -> None:
    stub = host.directory / "stub"
    stub.write_text(f'#!/bin/sh\nfor a; do [ "$a" = {step} ] && [ ! -e {stub}.ok ] && exit 9; done\nexec runc "$@"\n')
    stub.chmod(0o755)

    async def live() -> None:
        await host.create("stubbed", ["true"], runtime=str(stub))
        await host.supervisor.start_task("test", "stubbed")
        await host.exit_of("stubbed")
        await host.delete("stubbed")

    with pytest.raises(FailedPrecondition):
        await live()
    Path(f"{stub}.ok").touch()
    await host.delete("stubbed", force=True)
    assert list((host.state / "shims").iterdir()) == []


async def test_output_is_read_to_the_last_byte(host: Host) -> None:
    fifo = host.directory / "out"
    os.mkfifo(fifo)
    thread, counted = reader_of(fifo)
    await host.run("much", ["dd", "if=/dev/zero", "bs=65536", "count=1600"], stdio=Stdio(stdout=str(fifo)))
    assert (await host.exit_of("much")).exit_status == 0
    await asyncio.to_thread(thread.join, 20)
    assert counted == [1600 * 65536]


async def test_nobody_reading_hangs_nothing(host: Host) -> None:
    fifo = host.directory / "out"
    os.mkfifo(fifo)
    await host.run("unread", ["sh", "-c", "yes | head -c 1000000"], stdio=Stdio(stdout=str(fifo)))
    await asyncio.sleep(0.2)
    await host.supervisor.kill("test", "unread", signal.SIGKILL, False)
    assert (await host.exit_of("unread")).exit_status == 137
    assert await host.delete("unread") is not None


async def test_what_is_left_in_the_host_s_pids_goes_with_the_container_s_first_process(host: Host) -> None:
    linux = {"namespaces": [{"type": kind} for kind in ("ipc", "uts", "mount", "network")]}
    pid = await host.run("host", ["sh", "-c", "sleep 1000 & wait"], linux=linux)
    await until(lambda: bool(psutil.Process(pid).children()))
    (child,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    assert (await host.exit_of("host")).exit_status == 137
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    await host.delete("host")


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_reader_has_read_all_before_it_is_told_that_the_process_is_forgotten(
    host: Host, *, terminal: bool
) -> None:
    """Containerd's client lets go of its FIFOs then, whatever is in them."""
    fifo = host.directory / "out"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        await host.run("slow", ["sh", "-c", "echo word"], stdio=Stdio(stdout=str(fifo), terminal=terminal))
        await host.exit_of("slow")
        deleting = asyncio.create_task(host.delete("slow"))
        done, _ = await asyncio.wait({deleting}, timeout=0.2)
        assert not done
        assert os.read(reader, 100).split() == [b"word"]
        assert await deleting is not None
        # One that never reads is waited for no longer than that.
        await host.run("stuck", ["sh", "-c", "echo word"], stdio=Stdio(stdout=str(fifo), terminal=terminal))
        await host.exit_of("stuck")
        async with asyncio.timeout(2):
            await host.delete("stuck")
    finally:
        os.close(reader)


async def test_stdin_ends_when_it_is_closed(host: Host) -> None:
    stdin, stdout = host.directory / "in", host.directory / "out"
    os.mkfifo(stdin)
    os.mkfifo(stdout)
    thread, counted = reader_of(stdout)
    await host.run("cat", ["cat"], stdio=Stdio(stdin=str(stdin), stdout=str(stdout)))
    await asyncio.to_thread(stdin.write_bytes, b"hello\n" * 1000)
    await asyncio.sleep(0.1)
    assert host.exits == []
    await host.supervisor.close_stdin("test", "cat")
    assert (await host.exit_of("cat")).exit_status == 0
    await asyncio.to_thread(thread.join, 20)
    assert counted == [6000]


async def test_output_goes_to_a_file_as_it_is(host: Host) -> None:
    path = host.directory / "log"
    await host.run(
        "logs", ["sh", "-c", "echo out; echo err >&2"], stdio=Stdio(stdout=f"file://{path}", stderr=f"file://{path}")
    )
    await host.exit_of("logs")
    assert sorted(path.read_text().split()) == ["err", "out"]


async def test_a_terminal_has_its_size_and_its_last_words(host: Host) -> None:
    stdin, stdout = host.directory / "in", host.directory / "out"
    os.mkfifo(stdin)
    os.mkfifo(stdout)
    chunks: list[bytes] = []

    def read() -> None:
        with stdout.open("rb", buffering=0) as file:
            while data := file.read(65536):
                chunks.append(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    command = ["sh", "-c", "read line; stty size; echo got $line; seq 1 2000"]
    await host.run("tty", command, stdio=Stdio(stdin=str(stdin), stdout=str(stdout), terminal=True))
    await host.supervisor.resize("test", "tty", 101, 37)
    await asyncio.to_thread(stdin.write_bytes, b"word\n")
    assert (await host.exit_of("tty")).exit_status == 0
    await asyncio.to_thread(thread.join, 20)
    text = b"".join(chunks).decode().replace("\r", "")
    assert "37 101\n" in text
    assert "got word\n" in text
    assert text.endswith("1999\n2000\n")


async def test_orphans_are_reaped(host: Host) -> None:
    pid = await host.run("orphans", ["sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 0.5"])
    await host.exit_of("orphans")
    left = psutil.Process(host.shim_pid("orphans")).children()
    assert [child for child in left if child.status() == psutil.STATUS_ZOMBIE] == []
    assert not Path(f"/proc/{pid}").exists()


async def test_exits_are_on_disk_before_they_are_told_and_survive_the_service(host: Host) -> None:
    await host.run("later", ["sh", "-c", "sleep 0.5; exit 5"])
    await host.supervisor.close()
    await asyncio.sleep(1)
    assert host.exits == []
    recorded = protocol.read_json(str(host.state / "shims" / place_of("test", "later")), protocol.EXIT)
    assert recorded is not None
    assert recorded["exit_status"] == 5
    found = await host.restart()
    assert [(f.id, f.status) for f in found] == [("later", "stopped")]
    assert (await host.exit_of("later")).exit_status == 5


async def test_a_killed_zygote_harms_nobody(host: Host) -> None:
    await host.run("survivor", ["sleep", "60"])
    zygote = psutil.Process(host.shim_pid("survivor")).parent()
    assert zygote is not None
    zygote.kill()
    await asyncio.sleep(0.3)
    assert (await host.supervisor.state("test", "survivor"))["status"] == "running"
    await host.run("next", ["sh", "-c", "exit 4"])
    assert (await host.exit_of("next")).exit_status == 4
    await host.supervisor.kill("test", "survivor", signal.SIGTERM, False)
    await host.supervisor.kill("test", "survivor", signal.SIGKILL, False)
    assert (await host.exit_of("survivor")).exit_status == 137


@pytest.mark.parametrize("state", ["created", "running"])
async def test_a_killed_shim_takes_its_container_down(state: str, host: Host) -> None:
    pid = await (host.run if state == "running" else host.create)("doomed", ["sleep", "60"])
    os.kill(host.shim_pid("doomed"), signal.SIGKILL)
    assert (await host.exit_of("doomed")).exit_status == 137
    assert not lives(pid)
    assert mounts.mounts_below(str(host.directory)) == []
    deleted = await host.delete("doomed")
    assert deleted is not None
    assert deleted.exit_status == 137


async def test_a_shim_killed_while_the_service_was_away_is_found(host: Host) -> None:
    await host.run("doomed", ["sleep", "60"])
    shim = host.shim_pid("doomed")
    await host.supervisor.close()
    processes = [shim, *(child.pid for child in psutil.Process(shim).children() if "shoal-worker" in child.name())]
    os.kill(shim, signal.SIGKILL)
    while any(lives(process) for process in processes):
        await asyncio.sleep(0.01)
    found = await host.restart()
    assert [(f.id, f.status) for f in found] == [("doomed", "dead")]
    assert (await host.exit_of("doomed")).exit_status == 137


async def test_the_same_request_again_finds_what_was_made(host: Host) -> None:
    first = await host.create("once", ["sleep", "60"])
    again = await host.supervisor.create(
        "test", "once", bundle=host.directory / "bundles/once", rootfs=bundles.bind(host.rootfs), runtime="runc",
        stdio=Stdio(), request_id="r-once",
    )  # fmt: skip
    assert again == first
    with pytest.raises(ShoalError):
        await host.supervisor.create(
            "test", "once", bundle=host.directory / "bundles/once", rootfs=bundles.bind(host.rootfs), runtime="runc",
            stdio=Stdio(), request_id="another",
        )  # fmt: skip


async def test_two_copies_hear_the_same_exit(host: Host) -> None:
    heard: list[ExitRecord] = []
    other = Supervisor(host.state, Locks(host.directory / "locks"), heard.append)
    await other.start()
    await host.run("shared", ["sh", "-c", "sleep 1.5; exit 6"])
    assert (await host.exit_of("shared")).exit_status == 6
    await asyncio.sleep(0.1)
    assert [e.exit_status for e in heard] == [6]
    await other.close()


async def test_an_exit_is_heard_by_a_copy_that_comes_to_know_the_container_only_then(host: Host) -> None:
    """The copy that made it dies at once, and is not started again."""
    heard: list[ExitRecord] = []
    other = Supervisor(host.state, Locks(host.directory / "locks"), heard.append)
    await other.start()
    for number in range(4):
        await host.run(f"quick-{number}", ["sh", "-c", f"exit {number}"])
    await host.supervisor.close()
    async with asyncio.timeout(20):
        while {(exit.id, exit.exit_status) for exit in heard} != {(f"quick-{n}", n) for n in range(4)}:
            await asyncio.sleep(0.02)
    await other.close()
    await host.restart()


async def test_an_operation_of_a_later_version_is_unimplemented_and_harms_nobody(host: Host) -> None:
    pid = await host.run("older", ["sleep", "60"])
    with pytest.raises(Unimplemented, match="hibernate"):
        await host.supervisor._ask("test", "older", {"op": "hibernate"})
    assert (await host.supervisor.state("test", "older"))["pid"] == pid


async def test_a_service_of_an_earlier_version_is_understood(host: Host) -> None:
    id, place = "younger", place_of("test", "younger")
    bundle = bundles.bundle(host.directory / "bundles" / id, bundles.spec(["sh", "-c", "exit 6"]))
    rootfs = [mount.model_dump() for mount in bundles.bind(host.rootfs)]
    asked = {
        "op": "create", "n": 1, "place": place, "namespace": "test", "id": id, "bundle": str(bundle),
        "runtime": shutil.which("runc"), "runtime_root": str(host.state / "oci/test"), "rootfs": rootfs,
        "stdio": Stdio().model_dump(), "request_id": "r",
    }  # fmt: skip  # without what has been added since
    with closing(protocol.connect(str(host.state), protocol.SHIM_SOCKET)) as connection:
        connection.sendall(protocol.encode(asked))
        await until((host.state / "shims" / place / protocol.INIT).exists)
        await host.supervisor.start_task("test", id)
        assert (await host.exit_of(id)).exit_status == 6


async def test_what_systemd_says_to_a_service_is_not_for_its_containers(
    tmp_path: Path, leaks: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("LISTEN_FDS", "1")
    async with running_host(tmp_path) as host:
        await host.run("quiet", ["sleep", "60"])
        environment = Path(f"/proc/{host.shim_pid('quiet')}/environ").read_text()  # as the zygote was started
        assert "NOTIFY_SOCKET" in environment
        runtime = host.directory / "runtime"
        runtime.write_text('#!/bin/sh\nenv >>"$0.environment"\nexec runc "$@"\n')
        runtime.chmod(0o755)
        await host.run("told", ["true"], runtime=str(runtime))
        told = Path(f"{runtime}.environment").read_text()
        assert "PATH=" in told
        assert "NOTIFY_SOCKET" not in told
        assert "LISTEN_FDS" not in told
