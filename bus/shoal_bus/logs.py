"""Structured log lines: readable on a terminal, JSON everywhere else, always on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any


def configure(service: str, level: str = "info") -> None:
    """Sets up structlog for this process; every line names the service."""
    import structlog

    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def get_logger(name: str) -> Any:
    """structlog's logger of that name, where this process has set up its log; else one that says nothing.

    A client of the bus (the command line, a controller's program) has streams of its own, and no log unless it wants
    one; nor does it load structlog, which takes as long as a request.
    """
    return _Logger(name)


class _Logger:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        structlog = sys.modules.get("structlog")
        if structlog is None or not structlog.is_configured():
            return _say_nothing
        return getattr(structlog.get_logger(self._name), method)


def _say_nothing(*_: object, **__: object) -> None:
    pass
