"""Secrets that only one service may read, whoever else sees the message, the database or the stream they lie in.

    sealed = seal(public_key, secret)        # anybody who has the service's public key
    secret = unseal(private_key, sealed)     # the service

Sealed boxes of libsodium (X25519, XSalsa20-Poly1305), by the library that nkeys are made with.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shoal_bus.errors import FailedPrecondition, InvalidArgument

KEY_BYTES = 32


def private_key(path: Path) -> bytes:
    """The key in a file that is made, readable by its owner alone, where there is none; copies agree on one."""
    from nacl.public import PrivateKey

    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(PrivateKey.generate()))
            os.fsync(fd)
            with suppress(FileExistsError):  # another copy was faster: its key is the one
                os.link(beside, path)
        finally:
            os.close(fd)
            beside.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise FailedPrecondition(f"{path}: is no key", hint="remove it, and start the service again")
    return key


def public_key(key: bytes) -> bytes:
    """What a private key's secrets are sealed with."""
    from nacl.public import PrivateKey

    return bytes(PrivateKey(key).public_key)


def seal(public: bytes, secret: bytes) -> bytes:
    """A secret that only the holder of the private key can read. INVALID_ARGUMENT for what is no public key."""
    from nacl.exceptions import CryptoError
    from nacl.public import PublicKey, SealedBox

    try:
        return bytes(SealedBox(PublicKey(public)).encrypt(secret))
    except (CryptoError, TypeError, ValueError):
        raise InvalidArgument("that is no key to seal a secret with") from None


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The secret. INVALID_ARGUMENT for what wasn't sealed for this key."""
    from nacl.exceptions import CryptoError
    from nacl.public import PrivateKey, SealedBox

    try:
        return bytes(SealedBox(PrivateKey(key)).decrypt(sealed))
    except (CryptoError, TypeError, ValueError):
        raise InvalidArgument("the secret wasn't sealed for this service", hint="ask it for its key again") from None
