"""Learning curves against everything that a run spends, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trapo_jax.comparison.results import Result

AXES = {
    "trained_tokens": "tokens trained",
    "sampled_tokens": "tokens sampled",
    "flops": "FLOPs",
    "problems": "problems seen",
    "seconds": "seconds",
}
NUM_GRID = 41
STYLES = ("-", "--", "-.", ":")  # so that colour is not all that tells methods apart


def plot_curves(path: Path, results: Sequence[Result]) -> None:
    """Accuracy on the validation split: the mean over seeds, and a band from the worst to the best."""
    from matplotlib.figure import Figure  # seconds to import

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).ravel()
    by_method: dict[str, list[Result]] = {}
    for result in results:
        by_method.setdefault(result.run.trial.method, []).append(result)
    for panel, (unit, name) in zip(panels, AXES.items(), strict=False):
        for i, (method, of_method) in enumerate(by_method.items()):
            x, curves = common_grid(of_method, unit)
            style = STYLES[i % len(STYLES)]
            panel.plot(x, curves.mean(axis=0), style, color=f"C{i % 10}", label=method)
            panel.fill_between(
                x, curves.min(axis=0), curves.max(axis=0), color=f"C{i % 10}", alpha=0.15, lw=0
            )
        panel.set(xlabel=name, ylim=(0, 1))
        panel.grid(alpha=0.3)
    for panel in (panels[0], panels[3]):
        panel.set_ylabel("validation accuracy, sampled")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", title="method")
    figure.savefig(path, dpi=110)


def common_grid(results: Sequence[Result], unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several runs at the same amounts spent, up to the least that one of them spent in all.

    Returns:
      Amounts `[n]` and accuracies `[runs, n]`, linear between the points of each run.
    """
    end = min(result.curve[-1].spent[unit] for result in results)
    x = np.linspace(0, end, NUM_GRID)
    curves = [
        np.interp(x, [p.spent[unit] for p in r.curve], [p.accuracy for p in r.curve])
        for r in results
    ]
    return x, np.array(curves)
