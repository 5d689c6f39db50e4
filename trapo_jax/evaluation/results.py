"""Presents the results of an evaluation: plots pass@k and creates a table for the terminal."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from trapo_jax.evaluation.scoring import Scores, mean_of_sources, powers_of_2_up_to


def plot_pass_at_k(path: Path, overall: Scores, by_source: Mapping[str, Scores]) -> None:
    """Plots pass@k as a function of k, overall and, if there are several sources, for each source."""
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curves = {"all": overall, **(by_source if len(by_source) > 1 else {})}
    for (name, scores), marker in zip(curves.items(), "osD^v<>ph*X" * len(curves), strict=False):
        k = range(1, scores.num_samples + 1)
        axes.plot(k, scores.pass_at_k, marker=marker, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    ticks = powers_of_2_up_to(max(scores.num_samples for scores in curves.values()))
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="k, samples per problem", ylabel="pass@k (fraction of problems)", ylim=(0, 1))
    axes.set_title(f"At least one of k samples is correct ({overall.num_problems} problems)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def table_of(overall: Scores, by_source: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the score table: one row per source, the mean of sources, and all problems.

    If the number k of samples per problem differs between sources, the last two rows have no pass@k or maj@k, because
    a mean of pass@32 and pass@1 is meaningless.
    """
    sources = list(by_source.items()) if len(by_source) > 1 else []
    rows = [*sources, ("mean", mean_of_sources(by_source))] if sources else []
    rows.append(("all", overall))
    numbers = {s.num_samples for s in by_source.values()}
    k, counted = (str(overall.num_samples), rows) if len(numbers) == 1 else ("k", sources)
    columns = {
        "": [name for name, _ in rows],
        "problems": [f"{s.num_problems:,}" for _, s in rows],
    }
    if k == "k":
        columns[k] = [str(s.num_samples) for _, s in counted]
    columns[f"avg@{k}"] = [f"{s.accuracy:.3f}" for _, s in rows]
    columns["95% CI"] = ["{:.3f}-{:.3f}".format(*s.interval) for _, s in rows]
    if max(numbers) > 1:  # Otherwise, pass@1 and maj@1 are the accuracy.
        columns[f"pass@{k}"] = [f"{s.pass_at_k[-1]:.3f}" for _, s in counted]
        columns[f"maj@{k}"] = [f"{s.majority:.3f}" for _, s in counted]
    if overall.no_answer is not None:  # None if the reward function does not extract answers.
        columns["no answer"] = [
            "" if s.no_answer is None else f"{s.no_answer:.3f}" for _, s in rows
        ]
    columns["truncated"] = [f"{s.truncated:.3f}" for _, s in rows]
    columns["grader errors"] = [f"{s.error_rate + s.timeout_rate:.3f}" for _, s in rows]
    return list(columns), [list(row) for row in zip_longest(*columns.values(), fillvalue="")]
