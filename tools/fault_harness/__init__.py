"""Provides jobs, faults and run comparisons for `tools/inject_faults.py`, `tools/soak.py` and the tests."""

import trapo_jax.distributed.log_level  # noqa: F401  must be imported before jax
