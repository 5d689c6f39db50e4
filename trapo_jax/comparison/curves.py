"""Plots learning curves against every resource that a run spends."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trapo_jax.comparison.results import Result
from trapo_jax.runs.budget import STEPS, UNITS

NUM_POINTS = 41
LINE_STYLES = ("-", "--", "-.", ":")  # Distinguish methods without color.


def plot_curves(path: Path, results: Sequence[Result]) -> None:
    """Plots validation accuracy: the mean over seeds, and a band from the worst to the best seed."""
    from matplotlib.figure import Figure  # The import takes seconds.

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).ravel()
    by_method: dict[str, list[Result]] = {}
    for result in results:
        by_method.setdefault(result.run.trial.method, []).append(result)
    labels = {name: unit.label for name, unit in UNITS.items() if name != STEPS}
    for panel, (unit, label) in zip(panels, labels.items(), strict=False):
        for i, (method, method_results) in enumerate(by_method.items()):
            x, curves = common_grid(method_results, unit)
            color, style = f"C{i % 10}", LINE_STYLES[i % len(LINE_STYLES)]
            panel.plot(x, curves.mean(axis=0), style, color=color, label=method)
            panel.fill_between(
                x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, lw=0
            )
        panel.set(xlabel=label, ylim=(0, 1))
        panel.grid(alpha=0.3)
    for panel in (panels[0], panels[3]):
        panel.set_ylabel("validation accuracy, sampled")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", title="method")
    figure.savefig(path, dpi=110)


def common_grid(results: Sequence[Result], unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Interpolates the curves of several runs on a common grid of amounts spent, up to the smallest total of any run.

    Returns:
      Amounts `[n]` and accuracies `[runs, n]`, interpolated linearly between each run's evaluations.
    """
    end = min(result.curve[-1].spent[unit] for result in results)
    x = np.linspace(0, end, NUM_POINTS)
    curves = [
        np.interp(x, [p.spent[unit] for p in r.curve], [p.accuracy for p in r.curve])
        for r in results
    ]
    return x, np.array(curves)
