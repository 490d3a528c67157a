"""The OCI runtime alone: create, start, wait, delete from a loop. What either side can reach at most.

A process of its own (`python -m bench.support.raw`), since it takes the containers' processes for its own: they are
reparented to it when `create` ends, as they are to a shim. What to do comes by standard input, and the result goes to
standard output, as JSON; the argument only says in its command line whose it is.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_ROOT = Path(__file__).resolve().parents[2]


def measure(
    runtime: str, template: dict[str, Any], rootfs: Path, work: Path, cgroup: str, *, seconds: float, concurrency: int
) -> tuple[float, dict[str, float]]:
    """Life cycles a second, and mean milliseconds of each step. Bundles are made below `work`.

    Raises RuntimeError with the runtime's own words.
    """
    job = {
        "runtime": runtime, "template": template, "rootfs": str(rootfs), "work": str(work), "cgroup": cgroup,
        "seconds": seconds, "concurrency": concurrency,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.support.raw", str(work)], cwd=_ROOT, input=json.dumps(job), check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the loop failed")
    told = json.loads(done.stdout)
    return float(told["rate"]), {str(name): float(mean) for name, mean in told["steps"].items()}


class Loop:
    """Containers by the runtime's command line, one after another or several at once."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._work = Path(job["work"])
        self._state = self._work / "oci"
        self._numbers: Iterator[int] = count()
        self._failures: list[BaseException] = []
        self.seconds: dict[str, list[float]] = {"create": [], "start": [], "wait": [], "delete": []}

    def rate(self) -> float:
        self._state.mkdir(parents=True, exist_ok=True)
        self._one()  # what is cold the first time
        for taken in self.seconds.values():
            taken.clear()
        done = [0] * self._job["concurrency"]
        begun = time.perf_counter()

        def worker(slot: int) -> None:
            try:
                while time.perf_counter() - begun < self._job["seconds"] and not self._failures:
                    self._one()
                    done[slot] += 1
            except BaseException as failure:  # noqa: BLE001 (told by the main thread)
                self._failures.append(failure)

        threads = [threading.Thread(target=worker, args=(slot,)) for slot in range(len(done))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
        return sum(done) / (time.perf_counter() - begun)

    def _one(self) -> None:
        id = f"raw{os.getpid()}-{next(self._numbers)}"
        bundle = self._work / id
        bundle.mkdir()
        spec = copy.copy(self._job["template"])
        spec["root"] = spec["root"] | {"path": self._job["rootfs"]}
        spec["process"] = spec["process"] | {"args": ["true"]}
        spec["linux"] = spec["linux"] | {"cgroupsPath": f"/{self._job['cgroup']}/{id}"}
        (bundle / "config.json").write_text(json.dumps(spec))
        pid_file = bundle / "pid"
        with self._step("create"):
            self._runtime("create", "--bundle", str(bundle), "--pid-file", str(pid_file), id)
        pid = int(pid_file.read_text())
        with self._step("start"):
            self._runtime("start", id)
        with self._step("wait"):
            os.waitpid(pid, 0)
        with self._step("delete"):
            self._runtime("delete", id)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - begun)

    def _runtime(self, *arguments: str) -> None:
        log = self._work / "log"
        command = [self._job["runtime"], "--root", str(self._state), *arguments]
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
        errors = (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[*null, errors])
        _, status = os.waitpid(pid, 0)
        if status != 0:
            raise RuntimeError(f"{command[0]} {arguments[0]}: {log.read_text().strip()}")


def main() -> None:
    job = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    loop = Loop(job)
    rate = loop.rate()
    steps = {name: statistics.mean(seconds) * 1000 for name, seconds in loop.seconds.items() if seconds}
    json.dump({"rate": rate, "steps": steps}, sys.stdout)


if __name__ == "__main__":
    main()
