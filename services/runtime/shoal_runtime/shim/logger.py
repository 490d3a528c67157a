"""`binary://` stdio: a program that is given a process's output, as containerd's log drivers are.

The URI's path is the program, its query the arguments (`binary:///usr/bin/log?id=7` runs `/usr/bin/log id 7`). It reads
standard output from descriptor 3 and standard error from 4, and closes 5 when it is ready; CONTAINER_ID and
CONTAINER_NAMESPACE are in its environment (containerd, docs: runtime/v2, "Logging").
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select

from shoal_runtime.shim.loop import Loop
from shoal_runtime.shim.protocol import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READY_SECONDS = 10.0
_ENDING_SECONDS = 3.0


class Logger:
    """One logging program. `stdout` and `stderr` are descriptors to write to; `ready` hears of it once, or why not."""

    def __init__(self, loop: Loop, uri: str, names: dict[str, str], ready: Callable[[ShimError | None], None]) -> None:
        self._loop, self._ready = loop, ready
        from urllib.parse import parse_qsl, unquote, urlsplit  # only where it is needed: half a mebibyte

        parts = urlsplit(uri)
        argv = [unquote(parts.path)]
        for key, value in parse_qsl(parts.query, keep_blank_values=True):
            argv += [key, value] if value else [key]
        if not argv[0].startswith("/"):
            raise ShimError("INVALID_ARGUMENT", f"standard streams: {uri}: give the program's absolute path")
        out, self.stdout = os.pipe2(os.O_CLOEXEC)
        error, self.stderr = os.pipe2(os.O_CLOEXEC)
        self._told, telling = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._on_end: list[Callable[[], None]] = []
        self._ended = False
        try:
            self._pid = loop.spawn(
                argv, self._exited, files={3: out, 4: error, 5: telling}, capture=False,
                environment=dict(os.environ) | names, session=True,
            )  # fmt: skip
        except OSError as problem:
            self._close_told()
            self.close()
            raise ShimError("FAILED_PRECONDITION", f"log program {argv[0]}: {problem.strerror}") from None
        finally:
            for fd in (out, error, telling):
                os.close(fd)
        loop.watch(self._told, select.POLLIN, lambda _: self._is_ready(None))
        loop.after(READY_SECONDS, lambda: self._is_ready(ShimError("DEADLINE_EXCEEDED", f"{argv[0]}: isn't ready")))

    @staticmethod
    def is_one(uri: str) -> bool:
        return uri.startswith("binary://")

    def _is_ready(self, error: ShimError | None) -> None:
        if self._told < 0:
            return
        self._close_told()
        self._ready(ShimError("FAILED_PRECONDITION", "the log program ended at once") if self._ended else error)

    def _close_told(self) -> None:
        self._loop.forget(self._told)
        os.close(self._told)
        self._told = -1

    def _exited(self, _status: int, _output: str) -> None:
        self._ended = True
        waiting, self._on_end = self._on_end, []
        for callback in waiting:
            callback()

    def finish(self, callback: Callable[[], None]) -> None:
        """No more comes: calls `callback` once the program has ended, which it is told to after a while."""
        self.close()
        if self._ended:
            callback()
            return
        self._on_end.append(callback)
        self._loop.after(_ENDING_SECONDS, lambda: self._signal(_signal.SIGTERM))
        self._loop.after(2 * _ENDING_SECONDS, lambda: self._signal(_signal.SIGKILL))

    def _signal(self, number: int) -> None:
        if not self._ended:
            os.kill(self._pid, number)

    def close(self) -> None:
        """Closes our ends: the program reads what is left, and then the end."""
        for name in ("stdout", "stderr"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)
