"""OCI runtime specifications: made from an image's configuration, checked, and fitted to this machine."""

from __future__ import annotations

from shoal_runtime.spec.check import check_process, check_resources, check_run_spec, check_spec
from shoal_runtime.spec.fit import fit_to_host
from shoal_runtime.spec.generate import generate_spec

__all__ = ["check_process", "check_resources", "check_run_spec", "check_spec", "fit_to_host", "generate_spec"]
