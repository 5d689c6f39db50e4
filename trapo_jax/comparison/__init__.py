"""Compares methods: plans the grid of runs, executes them, collects their results, and writes the report.

This package does not use any devices, because the training processes need them.
"""

from trapo_jax.comparison.analysis import Comparison
from trapo_jax.comparison.experiment import compare, write_report
from trapo_jax.comparison.grid import (
    Grid,
    PlannedRun,
    Sweep,
    Trial,
    Variant,
    parse_sweep,
    parse_variant,
)
from trapo_jax.comparison.records import load_result
from trapo_jax.comparison.results import Result
from trapo_jax.comparison.run_pool import Failure

__all__ = [
    "Comparison",
    "Failure",
    "Grid",
    "PlannedRun",
    "Result",
    "Sweep",
    "Trial",
    "Variant",
    "compare",
    "load_result",
    "parse_sweep",
    "parse_variant",
    "write_report",
]
