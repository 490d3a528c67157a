"""Who one is to a registry, for one pull or push: asked for, and sealed so that only the node can read it."""

from __future__ import annotations

import getpass
import sys

from shoal_bus.api.content import RegistryCredential, seal_credential
from shoal_bus.client import Client
from shoal_bus.errors import InvalidArgument

_SAME = {"index.docker.io": "docker.io"}


async def sealed(client: Client, user: str, image: str) -> bytes:
    """What `--user NAME[:PASSWORD]` stands for, for the registry of `image`; nothing where it wasn't given.

    A password that isn't given is asked for on the terminal, or else read from standard input, up to the first line's
    end: so nobody sees it in the list of processes.
    """
    if not user:
        return b""
    name, colon, password = user.partition(":")
    if not name:
        raise InvalidArgument("--user: must be NAME or NAME:PASSWORD")
    if not colon:
        password = _password(name)
    registry = image.partition("/")[0]
    credential = RegistryCredential(registry=_SAME.get(registry, registry), user=name, password=password)
    return await seal_credential(client, credential)


def _password(name: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(f"Password of {name}: ")
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise InvalidArgument(
            f"--user {name}: no password on standard input", hint="as --user NAME < file, or --user NAME:PASSWORD"
        )
    return password
