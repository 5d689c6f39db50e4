"""The report of a comparison: a document for readers, and numeric tables."""

from collections.abc import Sequence

import numpy as np

from trapo_jax.comparison.analysis import (
    Comparison,
    Difference,
    estimate_scores,
    find_differences,
    find_warnings,
    score_methods,
)
from trapo_jax.comparison.document import (
    Block,
    Bullets,
    Code,
    Document,
    Heading,
    Image,
    Paragraph,
    Table,
    WarningBlock,
)
from trapo_jax.evaluation.statistics import LEVEL, Estimate
from trapo_jax.runs.budget import UNITS

BASE_MODEL = "base model"


def make_report(c: Comparison, curves: Image | None) -> tuple[Document, dict[str, Table]]:
    """Returns the report, and numeric tables by the name of their CSV file.

    Args:
      c: the comparison.
      curves: plot of the learning curves, if there is one.
    """
    differences = find_differences(c)
    unit = UNITS[c.grid.match].label
    blocks: list[Block] = [
        Paragraph(
            f"The budget of each run is {c.grid.budget:,.12g} {unit}. The base model, the data and their order, the "
            "chat template, the grader and the evaluation are the same for all runs. The test split is evaluated once "
            f"after training; accuracy is measured with {c.num_samples} samples per problem at temperature 1. "
            "Intervals have a coverage of at least 95% and come from a bootstrap over seeds and problems with "
            "Student's t distribution; with a single seed, they reflect only the choice of problems."
        ),
        *map(WarningBlock, find_warnings(c)),
        Heading("Scores on the test split"),
        score_table(c),
        Heading("Which differences are significant"),
        *_describe_differences(differences),
        Heading("Resources spent"),
        spending_table(c),
    ]
    if curves:
        blocks += [Heading("Learning curves"), curves]
    if c.trials:
        blocks += [Heading("Tuning on the validation split"), tuning_table(c)]
    blocks += [Heading("Command"), Code(c.command)]
    document = Document(f"{', '.join(c.grid.methods)} at equal {unit}", blocks)
    csv_tables = {
        "runs.csv": run_table(c),
        "scores.csv": score_numbers(c),
        "differences.csv": difference_numbers(differences),
    }
    return document, csv_tables


def _describe_differences(differences: Sequence[Difference]) -> list[Block]:
    if not differences:
        return [Paragraph("Fewer than two methods have complete runs.")]
    groups = {
        f"Significant at {LEVEL:.0%} (Holm correction for {len(differences)} differences):": True,
        "Not significant:": False,
    }
    blocks: list[Block] = []
    for title, is_significant in groups.items():
        items = [_describe_difference(d) for d in differences if d.is_significant is is_significant]
        blocks += [Paragraph(title), Bullets(items or ["none"])]
    if any(d.num_seeds == 1 for d in differences):
        blocks.append(Paragraph("With one seed per method, no difference can be significant."))
    return blocks


def _describe_difference(d: Difference) -> str:
    e = d.estimate
    return (
        f"{d.better} over {d.other}: +{e.mean:.3f} [{e.low:+.3f}, {e.high:+.3f}], adjusted p = {d.adjusted_p:.2g}, "
        f"{d.num_seeds} seed{'s' if d.num_seeds > 1 else ''}"
    )


def score_table(c: Comparison) -> Table:
    """Returns the scores on the test split: first the base model, then the methods, the best one first."""
    header = [
        "method",
        "setting",
        "seeds",
        "accuracy",
        "greedy",
        f"pass@{c.num_samples}",
        "entropy",
        "length",
        "guidance",
        "expert tokens",
    ]
    rows = []
    before = {r.run.seed: r.before for r in c.results if r.before}
    if before:
        base = estimate_scores(list(before.values()))
        rows.append([BASE_MODEL, "", str(len(before)), *map(_interval, base), "", "", "", ""])
    for row in score_methods(c):
        seeds = f"{row.num_seeds} of {c.grid.num_seeds}"
        rows.append(
            [
                row.method,
                row.setting,
                str(row.num_seeds) if row.num_seeds == c.grid.num_seeds else seeds,
                *map(_interval, (row.sampled, row.greedy, row.best_of)),
                f"{row.entropy:.3f}",
                f"{row.completion_len:.1f}",
                f"{row.guidance:.2f}",
                f"{row.expert_share:.0%}",
            ]
        )
    return Table(header, rows)


def score_numbers(c: Comparison) -> Table:
    """Returns the scores on the test split as numbers, with their intervals."""
    measures = ("sampled", "greedy", "best_of")
    header = ["method", "setting", "num_seeds"]
    header += [f"{name}_{part}" for name in measures for part in ("mean", "low", "high")]
    header += ["entropy", "completion_len", "guidance", "expert_share"]
    rows = [
        [
            *map(str, row[:3]),
            *(repr(x) for name in measures for x in getattr(row, name)[:3]),
            *(repr(x) for x in row[6:]),
        ]
        for row in score_methods(c)
    ]
    return Table(header, rows)


def difference_numbers(differences: Sequence[Difference]) -> Table:
    """Returns all differences as numbers."""
    numbers = ["mean", "low", "high", "p", "adjusted_p", "significant"]
    rows = [
        [
            *(d.better, d.other, str(d.num_seeds)),
            *map(repr, (*d.estimate, d.adjusted_p, d.is_significant)),
        ]
        for d in differences
    ]
    return Table(["better", "other", "num_seeds", *numbers], rows)


def run_table(c: Comparison) -> Table:
    """Returns a numeric table with one row per run, for further analysis."""
    scores = ["sampled", "greedy", "best_of", "entropy", "completion_len"]
    header = ["method", "setting", "seed", *scores, "guidance", "expert_share", *UNITS, "folder"]
    rows = []
    for r in c.results:
        assert r.after
        means = [r.after.sampled.mean(), r.after.greedy.mean(), r.after.best_of.mean()]
        numbers = [*means, r.entropy, r.after.completion_len, r.guidance, r.expert_share]
        numbers += [r.spent[unit] for unit in UNITS]
        labels = (r.run.trial.method, r.run.trial.setting, str(r.run.seed))
        rows.append([*labels, *(repr(float(x)) for x in numbers), str(r.run.folder)])
    return Table(header, rows)


def spending_table(c: Comparison) -> Table:
    """Returns the mean amounts spent, over seeds, and the largest deviation from the budget."""
    header = ["method", *(unit.label for unit in UNITS.values()), "off budget"]
    rows = []
    for method in c.methods:
        spent = [r.spent for r in c.results_of(method)]
        means = {unit: float(np.mean([s[unit] for s in spent])) for unit in UNITS}
        off = max(abs(s[c.grid.match] / c.grid.budget - 1) for s in spent)
        rows.append([method, *(_amount(x) for x in means.values()), f"{off:.2%}"])
    return Table(header, rows)


def tuning_table(c: Comparison) -> Table:
    """Returns the validation accuracy of every trial."""
    chosen = {r.run.trial for r in c.results}
    rows = [
        [
            t.trial.method,
            t.trial.setting,
            f"{t.score:.3f}" if t.score >= 0 else f"{t.num_failed} failed",
            "chosen" if t.trial in chosen else "",
        ]
        for t in c.trials
    ]
    return Table(["method", "setting", "accuracy", ""], rows)


def _interval(e: Estimate) -> str:
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _amount(x: float) -> str:
    return f"{x:,.0f}" if x < 1e9 else f"{x:.3g}"
