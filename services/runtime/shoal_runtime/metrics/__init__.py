"""What containers use, read from their cgroups."""

from shoal_runtime.metrics.verbs import Metrics

__all__ = ["Metrics"]
