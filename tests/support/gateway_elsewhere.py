"""A gateway without the node's blobs: in a mount namespace of its own, where an empty directory hides them."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    blobs = Path(sys.argv[sys.argv.index("--root") + 1]) / "content"
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", os.fsencode(blobs), b"tmpfs", 0, b"mode=700"),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    from shoal_gateway.__main__ import main as gateway

    gateway()


if __name__ == "__main__":
    main()
