"""Comparing methods: which runs, doing them, reading their results, and writing the report.

Host only: nothing here touches a device, so that the runs have them to themselves.
"""

from trapo_jax.comparison.curves import plot_curves
from trapo_jax.comparison.document import Document, Image, Table, to_html, to_markdown, write_csv
from trapo_jax.comparison.grid import Failure, Interrupted, do_runs
from trapo_jax.comparison.report import Comparison, describe
from trapo_jax.comparison.results import Result, pick_trials, read_result
from trapo_jax.comparison.trials import (
    Grid,
    Run,
    Sweep,
    Trial,
    Variant,
    read_sweep,
    read_variant,
)

__all__ = [
    "Comparison",
    "Document",
    "Failure",
    "Grid",
    "Image",
    "Interrupted",
    "Result",
    "Run",
    "Sweep",
    "Table",
    "Trial",
    "Variant",
    "describe",
    "do_runs",
    "pick_trials",
    "plot_curves",
    "read_result",
    "read_sweep",
    "read_variant",
    "to_html",
    "to_markdown",
    "write_csv",
]
