"""Registry credentials, from Docker's `config.json` (`auths` only: what credential helpers hold isn't asked for)."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_DOCKER_HUB = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Credential:
    """A user and a password, or an identity token; none of it shows in a log."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an `Authorization` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def config_path() -> Path:
    """Where Docker's configuration is: `$DOCKER_CONFIG`, or `~/.docker`."""
    directory = os.environ.get("DOCKER_CONFIG", "")
    return Path(directory) / "config.json" if directory else Path.home() / ".docker" / "config.json"


def find(domain: str, path: Path | None = None) -> Credential | None:
    """What the configuration has for a registry, or None. A file that can't be read is a warning, not an error."""
    try:
        path = path or config_path()
        auths = json.loads(path.read_text()).get("auths", {})
        keys = _DOCKER_HUB if domain in _DOCKER_HUB else (domain, f"https://{domain}", f"http://{domain}")
        entries = {key.rstrip("/"): entry for key, entry in auths.items()}
        for key in keys:
            if (entry := entries.get(key.rstrip("/"))) is not None:
                return _credential(entry)
    except (FileNotFoundError, RuntimeError):  # no such file; no home directory
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        # The text of the error could quote the file.
        log.warning("credentials.unreadable", path=str(path), error=type(error).__name__)
    return None


def _credential(entry: dict[str, Any]) -> Credential | None:
    if entry.get("identitytoken"):
        return Credential(identity_token=str(entry["identitytoken"]))
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        return Credential(user, password.strip("\0"))
    if entry.get("username"):
        return Credential(str(entry["username"]), str(entry.get("password", "")))
    return None
