"""An OCI runtime's command line: runc's, which crun, youki and runsc share."""

from __future__ import annotations

import os
import time

from shoal_runtime.shim import codec, mounts
from shoal_runtime.shim.files import read, unlink
from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.protocol import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Done = Callable[["ShimError | None"], None]

PID_FILE = "init.pid"
_DELETIONS = 5


class OciRuntime:
    """One container of one runtime. `options` are containerd's runc options, those that concern the command line."""

    def __init__(self, loop: Loop, binary: str, root: str, bundle: str, id: str, options: dict[str, Any]) -> None:
        self._loop, self.binary, self._root, self._bundle, self.id = loop, binary, root, bundle, id
        self._options = options
        self._runs, self.failed = 0, False
        self.has_hooks = True
        """They inherit what is in the runtime's environment."""

    @property
    def kind(self) -> str:
        """Which runtime it is by its name: those that we know more of are `runc` and `crun`."""
        return os.path.basename(self.binary)

    @property
    def place(self) -> str:
        """The directory where runc, and crun, keep what they know of the container."""
        return f"{self._root}/{self.id}"

    @property
    def uses_systemd(self) -> bool:
        return bool(self._options.get("systemd_cgroup"))

    def create(self, files: Mapping[int, int], console: str, done: Done) -> None:
        """Creates the container with its first process waiting to be started."""
        arguments = ["create", "--bundle", self._bundle, "--pid-file", f"{self._bundle}/{PID_FILE}"]
        self._run([*arguments, *self._starting(console), self.id], done, files=files)

    def restore(self, images: str, files: Mapping[int, int], console: str, done: Done) -> None:
        """Creates the container from a checkpoint: it runs when this is done."""
        arguments = ["restore", "--detach", "--bundle", self._bundle, "--pid-file", f"{self._bundle}/{PID_FILE}"]
        arguments += ["--image-path", images, *self._criu_work()]
        self._run([*arguments, *self._starting(console), self.id], done, files=files)

    def _starting(self, console: str) -> list[str]:
        flags = {"no_pivot_root": "--no-pivot", "no_new_keyring": "--no-new-keyring"}
        chosen = [flag for name, flag in flags.items() if self._options.get(name)]
        return [*chosen, *(["--console-socket", console] if console else [])]

    def _criu_work(self) -> list[str]:
        work = self._options.get("criu_work_path")
        return ["--work-path", work] if work else []

    def exec(self, process: str, pid_file: str, files: Mapping[int, int], console: str, done: Done) -> None:
        """Starts a further process, which the file `process` describes; it runs when this is done."""
        arguments = ["exec", "--process", process, "--detach", "--pid-file", pid_file]
        self._run([*arguments, *(["--console-socket", console] if console else []), self.id], done, files=files)

    def start(self, done: Done) -> None:
        """Starts a created container, by the command."""
        self._run(["start", self.id], done)

    def state(self, told: Callable[[str], None]) -> None:
        """Its status in the runtime's own words (created, running, paused, stopped); empty if there is none."""
        printed: list[str] = []

        def asked(error: ShimError | None) -> None:
            status = ""
            if error is None:
                try:
                    status = str(codec.loads(printed[0].encode())["status"])
                except (ValueError, KeyError, TypeError):
                    pass
            told(status)

        self._run(["state", self.id], asked, printed=printed)

    def pause(self, done: Done) -> None:
        """Freezes every process."""
        self._run(["pause", self.id], done)

    def resume(self, done: Done) -> None:
        """Thaws them."""
        self._run(["resume", self.id], done)

    def update(self, resources: str, done: Done) -> None:
        """Sets the limits that the file `resources` holds."""
        self._run(["update", "--resources", resources, self.id], done)

    def checkpoint(self, path: str, flags: Sequence[str], done: Done) -> None:
        """Writes the container's state to a directory, with CRIU."""
        self._run(["checkpoint", "--image-path", path, *self._criu_work(), *flags, self.id], done)

    def kill(self, signal: int, all: bool, done: Done) -> None:
        """Sends a signal to the first process, or to all."""
        self._run(["kill", *(["--all"] if all else []), self.id, str(signal)], done)

    def delete(self, force: bool, done: Done, attempts: int = _DELETIONS) -> None:
        """Removes what the runtime keeps of the container, its cgroups included; again, if that is killed midway."""

        def deleted(error: ShimError | None) -> None:
            if error is not None and error.code == "ABORTED" and attempts > 1:
                self.delete(force, done, attempts - 1)
            elif error is not None and attempts < _DELETIONS:  # the one that was killed may have done it all
                self.state(lambda status: done(error if status else None))
            else:
                done(error)

        if self.failed:  # one that was killed may have left itself mounted there, as runc does for a moment
            mounts.unmount_all(self.place)
        self._run(["delete", *(["--force"] if force else []), self.id], deleted)

    def _run(
        self,
        arguments: list[str],
        done: Done,
        files: Mapping[int, int] | None = None,
        printed: list[str] | None = None,
    ) -> None:
        self._runs += 1
        log = f"{self._bundle}/runtime-{self._runs}.log"
        since = time.clock_gettime(time.CLOCK_BOOTTIME)
        systemd = ["--systemd-cgroup"] if self.uses_systemd else []
        argv = [self.binary, "--root", self._root, "--log", log, "--log-format", "json", *systemd, *arguments]

        def ended(status: int, output: str) -> None:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                self._loop.kill_strays(since)
            if printed is not None:
                printed.append(output)
            error = None if code == 0 else self._error(arguments[0], code, _logged(log) or output)
            unlink(log)
            done(error)

        try:
            self._loop.spawn(
                argv, ended, files=files, capture=files is None, environment=self._environment(),
                directory=self._bundle,  # as containerd's shims start it: wrappers of runtimes look there
            )  # fmt: skip
        except OSError as error:
            done(
                ShimError(
                    "FAILED_PRECONDITION", f"runtime {self.binary}: {error.strerror}", "install it, or name another"
                )
            )

    def _environment(self) -> dict[str, str]:
        """Ours; and runc, which does one thing after another, needs no threads for more processors than one.

        That is 6 % of its CPU time. Containers have an environment of their own.
        """
        environment = dict(os.environ)
        if self.kind == "runc" and not self.has_hooks:
            environment.setdefault("GOMAXPROCS", "1")
        return environment

    def _error(self, verb: str, code: int, output: str) -> ShimError:
        self.failed = True
        told = " ".join(output.split())[-500:]
        message = f"OCI runtime {verb} failed: {told or f'exit status {code}'}"  # containerd's words: clients know them
        if code < 0:  # somebody killed it: that says nothing of what was asked, and asking again may do it
            return ShimError(
                "ABORTED", f"{os.path.basename(self.binary)} {verb}: killed by signal {-code}", "ask again"
            )
        lower = told.lower()
        if verb in ("kill", "start") and (
            "not running" in lower or "no such process" in lower or "does not exist" in lower
        ):
            return ShimError("NOT_FOUND", message)
        return ShimError("FAILED_PRECONDITION", message)


def _logged(log: str) -> str:
    """The last error in a runtime's log."""
    found = ""
    try:
        for line in read(log).splitlines():
            try:
                entry = codec.loads(line)
            except ValueError:
                found = line.decode(errors="replace").strip() or found
                continue
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                found = str(entry.get("msg", ""))
    except FileNotFoundError:
        return ""
    return found
