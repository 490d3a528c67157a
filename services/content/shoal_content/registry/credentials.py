"""Registry credentials: from Docker's `config.json` (`auths`), and the credential helpers that it names.

A helper is a program `docker-credential-<name>` (docker-credential-helpers' protocol): asked by `get`, with the
registry on its standard input, it answers with JSON. `credHelpers` names one for a registry, `credsStore` one for all.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_DOCKER_HUB = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_SECONDS = 30.0
_MOST_BYTES = 1 << 20
_IDENTITY_TOKEN = "<token>"  # noqa: S105 (a helper's user of that name has an identity token for a secret)


@dataclass(frozen=True)
class Credential:
    """A user and a password, an identity token, or a registry's own token; none of it shows in a log."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an `Authorization` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def config_path() -> Path:
    """Where Docker's configuration is: `$DOCKER_CONFIG`, or `~/.docker`."""
    directory = os.environ.get("DOCKER_CONFIG", "")
    return Path(directory) / "config.json" if directory else Path.home() / ".docker" / "config.json"


async def find(domain: str, path: Path | None = None) -> Credential | None:
    """What the configuration or its helpers have for a registry (`host[:port]`), or None.

    What can't be read or doesn't answer is a warning, not an error: the registry may ask for no credential at all.
    """
    try:
        path = path or config_path()
        config = json.loads(await asyncio.to_thread(path.read_bytes))
        keys = _DOCKER_HUB if domain in _DOCKER_HUB else (domain, f"https://{domain}", f"http://{domain}")
        for name, key in _helpers(config, keys):
            if (found := await _ask(name, key)) is not None:
                return found
        return _of_auths(config.get("auths") or {}, keys)
    except (FileNotFoundError, RuntimeError):  # no such file; no home directory
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        # The text of the error could quote the file.
        log.warning("credentials.unreadable", path=str(path), error=type(error).__name__)
    return None


def _of_auths(auths: dict[str, Any], keys: tuple[str, ...]) -> Credential | None:
    entries = {key.rstrip("/"): entry for key, entry in auths.items()}
    # Docker writes some registries with a scheme and a path: https://r.example/v1/.
    hosts = {re.sub(r"^https?://", "", key).partition("/")[0]: entry for key, entry in auths.items() if "://" in key}
    for key in keys:
        entry = entries.get(key.rstrip("/")) or hosts.get(key)
        if entry and (found := _credential(entry)) is not None:
            return found
    return None


def _credential(entry: dict[str, Any]) -> Credential | None:
    if entry.get("identitytoken"):
        return Credential(identity_token=str(entry["identitytoken"]))
    if entry.get("registrytoken"):
        return Credential(token=str(entry["registrytoken"]))
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        return Credential(user, password.strip("\0"))
    if entry.get("username"):
        return Credential(str(entry["username"]), str(entry.get("password", "")))
    return None


# -------------------------------------------------------------------------------------------------------------- helpers


def _helpers(config: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """Which helper to ask, and for what: the registry's own before the one for all."""
    own = config.get("credHelpers") or {}
    asked = [(str(own[key]), key) for key in keys if own.get(key)][:1]
    if config.get("credsStore"):
        asked.append((str(config["credsStore"]), keys[0]))
    return asked


async def _ask(name: str, registry: str) -> Credential | None:
    if not _HELPER.fullmatch(name):
        log.warning("credentials.no_helper", helper=name[:100], error="its name is no program's")
        return None
    try:
        async with asyncio.timeout(_HELPER_SECONDS):
            output = await _run(f"docker-credential-{name}", registry.encode())
        answer = json.loads(output) if output is not None else {}
        user, secret = str(answer.get("Username") or ""), str(answer.get("Secret") or "")
    except TimeoutError:
        log.warning("credentials.helper_failed", helper=name, registry=registry, error="it doesn't answer")
        return None
    except (OSError, ValueError, AttributeError) as error:
        log.warning("credentials.helper_failed", helper=name, registry=registry, error=type(error).__name__)
        return None
    if not secret:
        return None
    return Credential(identity_token=secret) if user == _IDENTITY_TOKEN else Credential(user, secret)


async def _run(program: str, request: bytes) -> bytes | None:
    """What a helper prints, a megabyte at most; None if it has nothing. It doesn't outlive the call."""
    process = await asyncio.create_subprocess_exec(
        program, "get", stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(ConnectionError):  # it answers without having read the question
            process.stdin.write(request + b"\n")
            await process.stdin.drain()
            process.stdin.close()
        output = bytearray()
        while data := await process.stdout.read(65536):
            output += data
            if len(output) > _MOST_BYTES:
                raise ValueError("it prints without an end")
        return bytes(output) if await process.wait() == 0 else None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
