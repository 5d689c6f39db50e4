"""Presentation of the results of an evaluation: the plot of pass@k, and the table on the terminal."""

from collections.abc import Mapping
from pathlib import Path

from trapo_jax.evaluation.scoring import Scores, powers_of_2_up_to


def plot_pass_at_k(path: Path, overall: Scores, by_source: Mapping[str, Scores]) -> None:
    """Plots pass@k as a function of k, also for each source if there are several."""
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curves = {"all": overall, **(by_source if len(by_source) > 1 else {})}
    for (name, scores), marker in zip(curves.items(), "osD^v<>ph*X" * len(curves), strict=False):
        k = range(1, scores.num_samples + 1)
        axes.plot(k, scores.pass_at_k, marker=marker, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    ticks = powers_of_2_up_to(overall.num_samples)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="k, samples per problem", ylabel="pass@k (fraction of problems)", ylim=(0, 1))
    axes.set_title(f"At least one of k samples is correct ({overall.num_problems} problems)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def table_of(overall: Scores, by_source: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the score table: one row per source, and one for all problems."""
    n = overall.num_samples
    has_several = n > 1  # Otherwise, pass@1 and maj@1 are the accuracy.
    header = ["", "problems", f"avg@{n}", "95% CI"]
    header += [f"pass@{n}", f"maj@{n}"] if has_several else []
    header += ["trunc", "failed"]
    rows = [
        [
            name,
            f"{s.num_problems:,}",
            f"{s.accuracy:.3f}",
            f"{s.interval[0]:.3f}-{s.interval[1]:.3f}",
            *([f"{s.pass_at_k[-1]:.3f}", f"{s.majority:.3f}"] if has_several else []),
            f"{s.truncated:.3f}",
            f"{s.error_rate + s.timeout_rate:.3f}",
        ]
        for name, s in [*(by_source.items() if len(by_source) > 1 else []), ("all", overall)]
    ]
    return header, rows
