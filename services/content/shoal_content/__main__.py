"""`shoal-content`: the content service's process."""

from __future__ import annotations

from shoal_bus.process import run_service

from shoal_content.service import arguments, setup


def main() -> None:
    run_service("content", setup, arguments=arguments)


if __name__ == "__main__":
    main()
