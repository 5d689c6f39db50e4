"""Builds the report of a comparison: a document for people to read, and numeric tables."""

from collections.abc import Sequence

import numpy as np

from trapo_jax.comparison.analysis import (
    FAILURE_GAP,
    MEAN_OF_SOURCES,
    MIN_SEEDS_IF_ONE_FAILS,
    Comparison,
    Contrast,
    Difference,
    Estimate,
    MethodScores,
    accuracy_by_source,
    find_differences,
    find_warnings,
    score_methods,
)
from trapo_jax.comparison.document import (
    Block,
    Code,
    Document,
    Heading,
    Image,
    Paragraph,
    Table,
    WarningBlock,
)
from trapo_jax.runs.budget import UNITS

BASE_MODEL = "base model"


def make_report(c: Comparison, curves: Image | None) -> tuple[Document, dict[str, Table]]:
    """Returns the report, and numeric tables keyed by the names of their CSV files.

    Args:
      c: the comparison.
      curves: plot of the learning curves, if there is one.
    """
    scores, differences = score_methods(c), find_differences(c)
    unit = UNITS[c.grid.match].label
    blocks: list[Block] = [
        Paragraph(
            f"The budget of each run is {c.grid.budget:,.12g} {unit}. The base model, the data and its order, the "
            "chat template, the grader and the evaluation are the same for all runs. The test split is evaluated "
            f"after training; the tables show the accuracy of {c.sampling}."
        ),
        *map(WarningBlock, find_warnings(c)),
        Heading("Accuracy on the test split"),
        score_table(c, scores),
        Paragraph(
            "Brackets contain 95% confidence intervals over seeds and problems. They assume nothing about how accuracy "
            "is distributed over seeds. The interval of the mean allows for failing seeds that were not run; the "
            "interval of the median shows what to expect from a typical seed. iqm: mean of the middle half of the "
            f"seeds. failed: number of seeds whose accuracy is more than {FAILURE_GAP:g} below the accuracy of the "
            "method's best seed; if any seed failed, a comparison needs at least "
            f"{MIN_SEEDS_IF_ONE_FAILS} seeds per method."
        ),
        seed_table(c, scores),
        *_describe_sources(c),
        Heading("Differences"),
        *_describe_differences(differences, c.grid.margin),
        Heading("Other measures (means over seeds)"),
        measure_table(c, scores),
        Heading("Resources spent"),
        spending_table(c),
    ]
    if curves:
        blocks += [Heading("Learning curves"), curves]
    if c.trials:
        blocks += [Heading("Tuning on the validation split"), tuning_table(c)]
    blocks += [Heading("Commands"), Code(c.command), *_describe_code(c)]
    document = Document(f"{', '.join(c.grid.methods)} at equal {unit}", blocks)
    csv_tables = {
        "runs.csv": run_table(c),
        "scores.csv": score_numbers(scores),
        "differences.csv": difference_numbers(differences),
    }
    return document, csv_tables


def _describe_sources(c: Comparison) -> list[Block]:
    """Describes each method's accuracy by source, in descending order of the mean of the sources.

    The list is empty unless there are several sources.
    """
    by_method = {method: accuracy_by_source(c.results_of(method)) for method in c.methods}
    rows = sorted(
        ((method, found) for method, found in by_method.items() if found),
        key=lambda row: -row[1][MEAN_OF_SOURCES],
    )
    if not rows:
        return []
    header = ["method", *rows[0][1]]
    cells = [[method, *(f"{x:.3f}" for x in found.values())] for method, found in rows]
    text = (
        "The other tables pool the problems of all sources. This one shows the accuracy on each source's problems, "
        "averaged over seeds, and the unweighted mean of the sources, which is commonly reported when there are "
        "several benchmarks."
    )
    return [Heading("Accuracy by source"), Table(header, cells), Paragraph(text)]


def _describe_differences(differences: Sequence[Difference], margin: float) -> list[Block]:
    if not differences:
        return [Paragraph("Fewer than two methods have complete runs.")]
    header = ["higher mean", "other", "seeds"]
    for name in ("mean", "median"):
        header += [f"difference of {name}s", "adjusted p", "better"]
    rows = []
    for d in differences:
        row = [d.better, d.other, str(d.num_seeds)]
        for contrast in (d.mean, d.median):
            row += [
                _difference(contrast),
                f"{contrast.adjusted_p:.2g}",
                d.verdict(contrast, margin),
            ]
        rows.append(row)
    how = (
        f"The intervals of all {len(differences)} differences hold simultaneously with a probability of 95%, and "
        "agree with the adjusted p-values (Bonferroni): if p is below 0.05, the interval excludes 0. Two methods are "
        f"called equivalent if the interval lies within ±{margin:g}."
    )
    return [Table(header, rows), Paragraph(how)]


def _difference(x: Contrast) -> str:
    return f"{x.value:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def score_table(c: Comparison, scores: Sequence[MethodScores]) -> Table:
    """Returns the accuracy of the base model and of each method on the test split, with the best method first."""
    header = ["method", "setting", "seeds", "mean", "median", "iqm", "worst seed", "failed"]
    rows = []
    before = [r.before for r in c.results if r.before]
    if before:
        mean = np.mean([s.sampled.mean() for s in before])
        rows.append([BASE_MODEL, "", "", f"{mean:.3f}", "", "", "", ""])
    for row in scores:
        num_seeds = len(row.by_seed)
        seeds = f"{num_seeds} of {c.grid.num_seeds}"
        rows.append(
            [
                row.method,
                row.setting,
                str(num_seeds) if num_seeds == c.grid.num_seeds else seeds,
                *map(_interval, (row.sampled, row.median, row.iqm)),
                f"{min(row.by_seed.values()):.3f}",
                str(row.num_failed),
            ]
        )
    return Table(header, rows)


def seed_table(c: Comparison, scores: Sequence[MethodScores]) -> Table:
    """Returns the accuracy of every seed on the test split."""
    seeds = range(c.grid.num_seeds)
    rows = [
        [row.method, *(f"{row.by_seed[s]:.3f}" if s in row.by_seed else "" for s in seeds)]
        for row in scores
    ]
    return Table(["method", *(f"seed {s}" for s in seeds)], rows)


def measure_table(c: Comparison, scores: Sequence[MethodScores]) -> Table:
    """Returns the other measures, averaged over seeds."""
    header = ["method", "greedy", f"pass@{c.num_samples}"]
    header += ["entropy", "length", "guidance", "expert tokens"]
    rows = [
        [
            row.method,
            *map(_interval, (row.greedy, row.best_of)),
            f"{row.entropy:.3f}",
            f"{row.completion_len:.1f}",
            f"{row.guidance:.2f}",
            f"{row.expert_share:.0%}",
        ]
        for row in scores
    ]
    return Table(header, rows)


def score_numbers(scores: Sequence[MethodScores]) -> Table:
    """Returns a numeric table of the scores on the test split, with their intervals."""
    measures = ("sampled", "median", "iqm", "greedy", "best_of")
    others = ("entropy", "completion_len", "guidance", "expert_share")
    header = ["method", "setting", "num_seeds", "num_failed"]
    header += [f"{name}_{part}" for name in measures for part in ("value", "low", "high")]
    rows = [
        [
            *(row.method, row.setting, str(len(row.by_seed)), str(row.num_failed)),
            *(repr(x) for name in measures for x in getattr(row, name)),
            *(repr(getattr(row, name)) for name in others),
        ]
        for row in scores
    ]
    return Table([*header, *others], rows)


def difference_numbers(differences: Sequence[Difference]) -> Table:
    """Returns a numeric table of all differences."""
    numbers = [f"{name}_{part}" for name in ("mean", "median") for part in Contrast._fields]
    rows = [
        [d.better, d.other, str(d.num_seeds), *map(repr, (*d.mean, *d.median))] for d in differences
    ]
    return Table(["better", "other", "num_seeds", *numbers], rows)


def _describe_code(c: Comparison) -> list[Block]:
    """Returns a paragraph about the code versions and the machines of the runs."""
    if not c.results:
        return []
    commits = ", ".join(sorted({r.code for r in c.results}))
    processors = ", ".join(sorted({r.processor for r in c.results}))
    return [Paragraph(f"Code of the runs: {commits}. Processors: {processors}.")]


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
    """Returns the amounts spent, averaged over seeds, and the largest deviation from the budget."""
    header = ["method", *(unit.label for unit in UNITS.values()), "off budget"]
    rows = []
    for method in c.methods:
        spent = [r.spent for r in c.results_of(method)]
        means = {unit: float(np.mean([s[unit] for s in spent])) for unit in UNITS}
        off = max(abs(s[c.grid.match] / c.grid.budget - 1) for s in spent)
        rows.append([method, *(_amount(x) for x in means.values()), f"{off:.2%}"])
    return Table(header, rows)


def tuning_table(c: Comparison) -> Table:
    """Returns the validation accuracy and the number of seeds of every trial."""
    chosen = {r.run.trial for r in c.results}
    rows = [
        [
            t.trial.method,
            t.trial.setting,
            f"{t.score:.3f}" if t.score >= 0 else f"{t.num_failed} failed",
            str(len(t.accuracies)),
            "chosen" if t.trial in chosen else "",
        ]
        for t in c.trials
    ]
    return Table(["method", "setting", "accuracy", "seeds", ""], rows)


def _interval(e: Estimate) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _amount(x: float) -> str:
    return f"{x:,.0f}" if x < 1e9 else f"{x:.3g}"
