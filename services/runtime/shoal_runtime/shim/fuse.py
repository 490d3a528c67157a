"""File systems that a program serves (FUSE): a mount of type `fuse3.<program>` is that program's doing, as in
containerd. It is run with the mount's options, and stays behind until the mount is taken away. Loaded when needed."""

from __future__ import annotations

import errno
import os


def mount(kind: str, source: str, target: str, options: list[str]) -> None:
    """Has the program mount itself on `target`. OSError if it isn't there, or says no."""
    program = kind.partition(".")[2]
    found = next((p for p in _candidates(program) if os.access(p, os.X_OK)), "")
    if not found:
        raise OSError(errno.ENOENT, f"{program} isn't installed", f"mount {kind} on {target}")
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            # It goes on in the background: what it says from then on is nobody's.
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in ((null, 0), (null, 1), (writing, 2))]
            arguments = [program, *(["-o", ",".join(options)] if options else []), target]
            pid = os.posix_spawn(found, arguments, os.environ, file_actions=actions, setsid=True)
        finally:
            os.close(null)
        os.close(writing)
        writing = -1
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            text = os.read(reading, 4096).decode(errors="replace").strip().splitlines()
            said = text[-1] if text else f"ended with status {code}"
            raise OSError(errno.EIO, f"{program}: {said}", f"mount {kind} on {target}")
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _candidates(program: str) -> list[str]:
    places = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":")
    return [f"{place}/{program}" for place in places if place]
