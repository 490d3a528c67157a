"""An OCI runtime's command line: runc's, which crun, youki and runsc share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping

from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.protocol import ShimError

LOG = "runtime.log"
PID_FILE = "init.pid"


class OciRuntime:
    """One container of one runtime."""

    def __init__(self, loop: Loop, binary: str, root: str, bundle: str, id: str) -> None:
        self._loop, self.binary, self._root, self._bundle, self._id = loop, binary, root, bundle, id

    @property
    def exec_fifo(self) -> str:
        """What runc's created container waits on: it starts when somebody reads it."""
        return f"{self._root}/{self._id}/exec.fifo"

    @property
    def is_runc(self) -> bool:
        return os.path.basename(self.binary) == "runc"

    def create(self, files: Mapping[int, int], console: str, done: Callable[[ShimError | None], None]) -> None:
        """Creates the container with its first process waiting to be started."""
        arguments = ["create", "--bundle", self._bundle, "--pid-file", f"{self._bundle}/{PID_FILE}"]
        if console:
            arguments += ["--console-socket", console]
        self._run([*arguments, self._id], done, files=files)

    def start(self, done: Callable[[ShimError | None], None]) -> None:
        """Starts a created container, by the command."""
        self._run(["start", self._id], done)

    def kill(self, signal: int, all: bool, done: Callable[[ShimError | None], None]) -> None:
        """Sends a signal to the first process, or to all."""
        self._run(["kill", *(["--all"] if all else []), self._id, str(signal)], done)

    def delete(self, force: bool, done: Callable[[ShimError | None], None]) -> None:
        """Removes what the runtime keeps of the container, its cgroups included."""
        self._run(["delete", *(["--force"] if force else []), self._id], done)

    def _run(
        self,
        arguments: list[str],
        done: Callable[[ShimError | None], None],
        files: Mapping[int, int] | None = None,
    ) -> None:
        log = f"{self._bundle}/{LOG}"
        try:
            os.unlink(log)
        except FileNotFoundError:
            pass
        argv = [self.binary, "--root", self._root, "--log", log, "--log-format", "json", *arguments]

        def ended(status: int, output: str) -> None:
            code = os.waitstatus_to_exitcode(status)
            done(None if code == 0 else self._error(arguments[0], code, output))

        try:
            self._loop.spawn(argv, ended, files=files, capture=files is None)
        except OSError as error:
            done(
                ShimError(
                    "FAILED_PRECONDITION", f"runtime {self.binary}: {error.strerror}", "install it, or name another"
                )
            )

    def _error(self, verb: str, code: int, output: str) -> ShimError:
        told = self._logged() or " ".join(output.split())[-500:]
        how = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        message = f"{os.path.basename(self.binary)} {verb}: {told or how}"
        lower = told.lower()
        if verb in ("kill", "start") and (
            "not running" in lower or "no such process" in lower or "does not exist" in lower
        ):
            return ShimError("NOT_FOUND", message)
        return ShimError("FAILED_PRECONDITION", message)

    def _logged(self) -> str:
        """The last error in the runtime's own log."""
        found = ""
        try:
            with open(f"{self._bundle}/{LOG}", encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        found = line.strip() or found
                        continue
                    if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                        found = str(entry.get("msg", ""))
        except FileNotFoundError:
            return ""
        return found
