"""What an OCI runtime says of itself: its version, and its features (runtime-spec, features.md)."""

from __future__ import annotations

import asyncio
import json
import subprocess

from shoal_bus.api import runtime as api
from shoal_bus.context import Context
from shoal_bus.errors import FailedPrecondition

from shoal_runtime.runtimes import program_of, require_runtime

_SECONDS = 10.0


class RuntimeInfos:
    """Of any runtime; `default` is the node's."""

    def __init__(self, default: str) -> None:
        self._default = default

    async def info(self, ctx: Context, request: api.RuntimeInfoRequest) -> api.RuntimeInfo:
        """FAILED_PRECONDITION where there is no such program, or it doesn't say what it is."""
        runtime = request.runtime or self._default
        path, program = require_runtime(runtime), program_of(runtime)
        version = await _said(path, "--version")
        if version is None:
            raise FailedPrecondition(f"runtime {program}: `{program} --version` fails: not an OCI runtime")
        features = await _said(path, "features") or b""  # older ones have no such command
        first = version.decode(errors="replace").partition("\n")[0].strip()
        return api.RuntimeInfo(program=program, version=first, features=features if _is_object(features) else b"")


async def _said(program: str, command: str) -> bytes | None:
    """What it prints; None where it fails, or takes too long."""
    process = await asyncio.create_subprocess_exec(
        program, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output if process.returncode == 0 else None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
