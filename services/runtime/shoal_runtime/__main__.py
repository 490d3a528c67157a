"""`shoal-runtime`: the runtime service's process."""

from __future__ import annotations

from shoal_bus.process import run_service

from shoal_runtime.service import setup


def main() -> None:
    run_service("runtime", setup)


if __name__ == "__main__":
    main()
