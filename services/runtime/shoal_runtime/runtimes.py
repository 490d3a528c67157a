"""The OCI runtimes' programs, by whatever name a client has for them."""

from __future__ import annotations

import re
import shutil

from shoal_bus.errors import FailedPrecondition

_SHIM = re.compile(r"io\.containerd\.([a-z0-9_-]+)\.v\d+")
_SHIM_PATH = re.compile(r".*/containerd-shim-([a-z0-9_-]+)-v\d+")
_LINUX_V1 = "io.containerd.runtime.v1.linux"
"""What containerd before 1.4 called runc."""


def program_of(runtime: str) -> str:
    """The program, by name on PATH or by absolute path.

    Containerd names a shim, as `io.containerd.runc.v2` or by the path of `containerd-shim-runc-v2`. What such a shim
    runs stands in its name; shoal's own does the rest.

    >>> program_of("io.containerd.runc.v2"), program_of("/usr/bin/containerd-shim-crun-v1"), program_of("/opt/youki")
    ('runc', 'crun', '/opt/youki')
    """
    if runtime == _LINUX_V1:
        return "runc"
    named = _SHIM.fullmatch(runtime) or _SHIM_PATH.fullmatch(runtime)
    return named.group(1) if named else runtime


def require_runtime(runtime: str) -> str:
    """The path of its program; FAILED_PRECONDITION when there is none, before anything is made for it."""
    program = program_of(runtime)
    path = shutil.which(program)
    if path is None:
        raise FailedPrecondition(
            f'runtime "{program}" not found on PATH', hint="install it, or name another with --runtime"
        )
    return path
