"""`shoal-snapshot`: the snapshot service's process."""

from __future__ import annotations

from shoal_bus.process import run_service

from shoal_snapshot.service import arguments, setup


def main() -> None:
    run_service("snapshot", setup, arguments=arguments)


if __name__ == "__main__":
    main()
