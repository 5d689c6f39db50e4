"""Parts of `tools/inject_faults.py` and `tools/soak.py`: jobs, faults, and the comparison of runs."""
