"""Provides jobs, faults, and the comparison of runs to `tools/inject_faults.py`, `tools/soak.py`, and tests."""
