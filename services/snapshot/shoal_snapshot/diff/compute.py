"""Computes one layer; it is a worker that does so (`shoal_snapshot.work`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from shoal_snapshot.apply.errors import ApplyError
from shoal_snapshot.diff.archive import Archive
from shoal_snapshot.diff.changes import Changes, Owner, owner_on_disk
from shoal_snapshot.diff.compress import Sink
from shoal_snapshot.mounting import detached, overlay_directories

_PROGRESS_SECONDS = 0.1


def compute(arguments: dict[str, Any], say: Callable[[dict[str, Any]], None], output: int) -> dict[str, Any]:
    """Writes the layer that makes `upper` of `lower` (mount lists) to `output`, and says what it is."""
    lower, upper = arguments["lower"], arguments["upper"]
    epoch = arguments.get("source_date_epoch")
    sink = Sink(output, arguments["compression"])
    archive = Archive(sink.write, None if epoch is None else epoch * 1_000_000_000)
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(_PROGRESS_SECONDS):
            say({"uncompressed": sink.uncompressed, "written": sink.written})

    reporter = threading.Thread(target=report, name="progress", daemon=True)
    with ExitStack() as stack:
        upper_fd = stack.enter_context(detached(upper))
        lower_fd = stack.enter_context(detached(lower)) if lower else None
        hint_fd = None
        if arguments.get("hints", True) and (changed := changed_directory(lower, upper)):
            hint_fd = os.open(changed, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, hint_fd)
        reporter.start()
        try:
            Changes(archive, upper_fd, lower_fd, hint_fd, owner_in(upper)).run()
            archive.finish()
            sink.finish()
        except FileNotFoundError as error:
            raise ApplyError(
                "a file went away while it was read", hint="pause or stop what writes there", code="ABORTED"
            ) from error
        finally:
            stop.set()
            reporter.join()
    return {
        "digest": sink.digest, "size": sink.written, "diff_id": sink.diff_id, "uncompressed": sink.uncompressed,
        "entries": archive.entries,
    }  # fmt: skip


def directories_of(mounts: list[dict[str, Any]]) -> list[str]:
    """The directories that a mount list shows as one, the uppermost first."""
    found: list[str] = []
    for mount in mounts:
        options = mount.get("options") or []
        if "overlay" in mount["type"]:
            upper, lowers = overlay_directories(options)
            found += [upper, *lowers] if upper else lowers
        else:
            found.append(mount["source"])
    return found


def changed_directory(lower: list[dict[str, Any]], upper: list[dict[str, Any]]) -> str:
    """The directory that holds all of what `upper` has and `lower` hasn't: overlayfs's own. Empty if there is none."""
    above, below = directories_of(upper), directories_of(lower)
    return above[0] if len(above) > 1 and above[1:] == below else ""


def owner_in(mounts: list[dict[str, Any]]) -> Owner:
    """How owners on disk are those in the container: what is written to an overlay with mapped ids has the host's."""
    options = dict(str(option).partition("=")[::2] for mount in mounts for option in mount.get("options") or [])
    if "upperdir" not in options or "uidmap" not in options:
        return owner_on_disk
    users, groups = (_mappings(options.get(key, "")) for key in ("uidmap", "gidmap"))
    return lambda status: (_inside(users, status.st_uid), _inside(groups, status.st_gid))


def _mappings(text: str) -> list[tuple[int, int, int]]:
    found = []
    for one in filter(None, text.split(",")):
        inside, outside, size = (int(number) for number in one.split(":"))
        found.append((inside, outside, size))
    return found


def _inside(mappings: list[tuple[int, int, int]], id: int) -> int:
    for inside, outside, size in mappings:
        if outside <= id < outside + size:
            return inside + id - outside
    return id
