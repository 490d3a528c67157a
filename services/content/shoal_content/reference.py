"""Image references (`shoal_bus.image_reference`), by the name that this service's modules know them under."""

from __future__ import annotations

from shoal_bus.image_reference import DEFAULT_DOMAIN, DEFAULT_TAG, Reference, is_repository, parse

__all__ = ["DEFAULT_DOMAIN", "DEFAULT_TAG", "Reference", "is_repository", "parse"]
