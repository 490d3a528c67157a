"""The way of an archive between us and the node: an entry of `<state>/archives`, which the content service opens.

A file is a symbolic link there, so that the service works on it directly, and may begin again where it has to. What
comes by standard input, or goes to standard output, is a FIFO that we copy to or from, in a thread of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_bus.api.content import ARCHIVES
from shoal_bus.errors import FailedPrecondition, InvalidArgument, PermissionDenied, from_exception

_CHUNK = 1 << 20
_POLL_SECONDS = 0.01
_JOIN_SECONDS = 30.0


@contextmanager
def incoming(state: Path, path: str) -> Iterator[str]:
    """The name of an entry for what is at `path`, or (empty) comes by standard input, while the block lasts."""
    if not path and os.isatty(0):
        raise InvalidArgument("standard input is a terminal", hint="give the archive as --input FILE, or `< FILE`")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else os.dup(0)
    except OSError as error:
        raise InvalidArgument(f"--input {path}: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise InvalidArgument(
                f"--input {path}: is a directory", hint="`tar -C DIR -c . | shoal load` takes a layout"
            )
        if path and stat.S_ISREG(mode):
            with _entry(state) as place:
                place.symlink_to(Path(path).resolve())
                yield place.name
        else:
            with _entry(state) as place:
                os.mkfifo(place, 0o600)
                with _copying(lambda stop: _feed(fd, place, stop)):
                    yield place.name
    finally:
        os.close(fd)


@contextmanager
def outgoing(state: Path, path: str) -> Iterator[str]:
    """The name of an entry for what is to be at `path`, or (empty) to go to standard output.

    A file comes to its place at the block's end, whole; if the block raises, there is none, or the one from before.
    """
    if not path:
        if os.isatty(1):
            raise InvalidArgument("standard output is a terminal", hint="name a file with --output, or use a pipe")
        with _to_stream(state, os.dup(1)) as name:
            yield name
        return
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            with _to_stream(state, os.open(target, os.O_WRONLY | os.O_CLOEXEC)) as name:
                yield name
            return
        target = target.resolve()  # a link's own target is what is replaced
        beside = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.partial")
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise InvalidArgument(f"--output {path}: {error.strerror}") from None
    try:
        with _entry(state) as place:
            place.symlink_to(beside)
            yield place.name
        beside.replace(target)
        _sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _to_stream(state: Path, fd: int) -> Iterator[str]:
    try:
        with _entry(state) as place:
            os.mkfifo(place, 0o600)
            source = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with _copying(lambda stop: _drain(source, fd, stop)):
                yield place.name
    finally:
        os.close(fd)


@contextmanager
def _entry(state: Path) -> Iterator[Path]:
    """A new place among the archives, for the length of the block; what killed commands left there goes."""
    if os.geteuid() != 0:
        raise PermissionDenied("archives come and go through the node's own files", hint="run as root, on the node")
    directory = state / ARCHIVES
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in directory.iterdir():
            pid = old.name.partition("-")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                old.unlink(missing_ok=True)
    except OSError as error:
        raise from_exception(error) from None
    place = directory / f"{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield place
    finally:
        place.unlink(missing_ok=True)


@contextmanager
def _copying(copy: Callable[[threading.Event], None]) -> Iterator[None]:
    """Copies beside the block. At its end all is copied; if it raises, what isn't is left."""
    stop, failed = threading.Event(), list[OSError]()

    def run() -> None:
        try:
            copy(stop)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="archive", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        stop.set()
        thread.join(0.5)  # one that waits for standard input ends with us
        if failed and not isinstance(error, KeyboardInterrupt):
            raise failed[0] if isinstance(failed[0], BrokenPipeError) else from_exception(failed[0]) from None
        raise
    thread.join(_JOIN_SECONDS)
    if failed:
        raise failed[0] if isinstance(failed[0], BrokenPipeError) else from_exception(failed[0]) from None
    if thread.is_alive():
        raise FailedPrecondition("the archive's reader doesn't take its end")


def _feed(source: int, place: Path, stop: threading.Event) -> None:
    """Copies to a FIFO once somebody reads it, as long as somebody does."""
    while True:
        try:
            sink = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ENXIO or stop.is_set():  # nobody reads it yet (fifo(7))
                return
            time.sleep(_POLL_SECONDS)
    try:
        os.set_blocking(sink, True)
        with suppress(OSError):
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _CHUNK)
        while not stop.is_set() and (data := os.read(source, _CHUNK)):
            _write(sink, data)
    except BrokenPipeError:
        return  # whoever reads it has had enough, and the operation tells why
    finally:
        os.close(sink)


def _drain(source: int, sink: int, stop: threading.Event) -> None:
    """Copies from a FIFO, from when somebody writes to it until nobody does any more, and closes it.

    Also when nobody takes what is copied: whoever writes must not wait for a reader that is gone.
    """
    try:
        with suppress(OSError):
            fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, _CHUNK)
        _copy(source, sink, stop)
    finally:
        os.close(source)


def _copy(source: int, sink: int, stop: threading.Event) -> None:
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while True:
        for _, event in poll.poll(100):
            data = b""
            with suppress(BlockingIOError):
                data = os.read(source, _CHUNK)
            if not data and event & select.POLLHUP:
                return
            _write(sink, data)
            break
        else:
            if stop.is_set():
                return


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Bar:
    """How far something is, in one line of a terminal's standard error; nothing elsewhere.

    with Bar(quiet=False) as bar:
        bar.update("reading", done, total)
    """

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> Bar:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
                TransferSpeedColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._progress.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes; 0 is a total that isn't known."""
        if self._shown:
            self._progress.update(self._task, description=what, completed=done, total=total or None)
