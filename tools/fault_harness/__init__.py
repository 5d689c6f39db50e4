"""Provides jobs, faults, and the comparison of runs to `tools/inject_faults.py`, `tools/soak.py`, and tests."""

import trapo_jax.distributed.log_level  # noqa: F401  must be imported before jax
