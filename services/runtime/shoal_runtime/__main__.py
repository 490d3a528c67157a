"""`shoal-runtime`: the runtime service's process."""

from __future__ import annotations

from shoal_bus.process import run_service

from shoal_runtime.service import arguments, setup


def main() -> None:
    run_service("runtime", setup, arguments=arguments)


if __name__ == "__main__":
    main()
