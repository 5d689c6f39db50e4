"""From results to what they say: tables, which differences are significant, and what a reader must not miss."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trapo_jax.comparison.document import (
    Block,
    Bullets,
    Code,
    Document,
    Heading,
    Image,
    Paragraph,
    Table,
    Warning_,
)
from trapo_jax.comparison.grid import Failure
from trapo_jax.comparison.results import UNITS, Result, Scores, TrialScore
from trapo_jax.comparison.trials import Grid
from trapo_jax.evaluation.statistics import LEVEL, Estimate, estimate, holm
from trapo_jax.types import UserError

BUDGET_TOLERANCE = 0.01
ENOUGH_SEEDS = 5
BASE = "base model"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that a report is made from.

    Attributes:
      grid: what was asked for.
      command: that made it.
      results: of the final runs that finished.
      failures: of runs of any kind.
      trials: how each did on the validation split; none if nothing was tuned.
    """

    grid: Grid
    command: str
    results: Sequence[Result]
    failures: Sequence[Failure]
    trials: Sequence[TrialScore]

    def of(self, method: str) -> list[Result]:
        return [r for r in self.results if r.run.trial.method == method]

    @property
    def methods(self) -> list[str]:
        """Those of which a run finished."""
        return [method for method in self.grid.methods if self.of(method)]


class Difference(NamedTuple):
    """The better method, the other, by how much, and the p-value adjusted for all differences looked at."""

    better: str
    other: str
    num_seeds: int
    estimate: Estimate
    adjusted_p: float = 1.0

    @property
    def is_significant(self) -> bool:
        # One seed says nothing about another.
        return self.num_seeds > 1 and self.adjusted_p < LEVEL


def describe(c: Comparison, curves: Image | None) -> tuple[Document, dict[str, Table]]:
    """The report, with the picture of the learning curves, and its tables as numbers, by CSV file."""
    differences = find_differences(c)
    unit = c.grid.match.replace("_", " ")
    blocks: list[Block] = [
        Paragraph(
            f"Every run may spend {c.grid.budget:,.12g} {unit}; base model, data and their order, template, verifier and "
            'evaluation are the same. Scored on the test split once, after training; "accuracy" is of samples at '
            f"temperature 1, {_num_samples(c)} a problem. Intervals: at least 95 %, paired bootstrap over seeds and problems, "
            "Student's t for the number of seeds; that of a single seed covers the choice of problems alone."
        ),
        *map(Warning_, find_warnings(c)),
        Heading("Scores on the test split"),
        score_table(c),
        Heading("Which differences are significant"),
        *_statement(differences),
        Heading("What was spent"),
        spending_table(c),
    ]
    if curves:
        blocks += [Heading("Learning curves"), curves]
    if c.trials:
        blocks += [Heading("Tuning, on the validation split"), tuning_table(c)]
    blocks += [Heading("Command"), Code(c.command)]
    document = Document(f"{', '.join(c.grid.methods)} at equal {unit}", blocks)
    csv_tables = {
        "runs.csv": run_table(c),
        "scores.csv": score_numbers(c),
        "differences.csv": difference_numbers(differences),
    }
    return document, csv_tables


def find_differences(c: Comparison) -> list[Difference]:
    """Of sampled accuracy, between any two methods, paired by seed and problem."""
    found = []
    for a, b in itertools.combinations(c.methods, 2):
        scores_a, scores_b = _scores_by_seed(c.of(a)), _scores_by_seed(c.of(b))
        seeds = sorted(scores_a.keys() & scores_b.keys())
        if not seeds:
            continue
        if len({scores[s].ids for scores in (scores_a, scores_b) for s in seeds}) > 1:
            folders = " and ".join(str(c.of(m)[0].run.folder) for m in (a, b))
            raise UserError(
                f"{folders}: scored on different problems; delete what is of an older comparison"
            )
        values = np.stack([scores_a[s].sampled - scores_b[s].sampled for s in seeds])
        if values.mean() < 0:
            a, b, values = b, a, -values
        found.append(Difference(a, b, len(seeds), estimate(values)))
    adjusted = holm([difference.estimate.p_value for difference in found])
    return [d._replace(adjusted_p=p) for d, p in zip(found, adjusted, strict=True)]


def find_warnings(c: Comparison) -> list[str]:
    """What would otherwise be taken for more than it is."""
    warnings = []
    fewest = min([c.grid.num_seeds, *(len(c.of(method)) for method in c.methods)])
    if fewest < ENOUGH_SEEDS:
        seeds = "1 seed" if fewest == 1 else f"{fewest} seeds"
        warnings.append(f"a smoke test, no result: {seeds} a method, not {ENOUGH_SEEDS}")
    for r in c.results:
        ratio = r.spent[c.grid.match] / c.grid.budget
        if abs(ratio - 1) > BUDGET_TOLERANCE:
            warnings.append(
                f"BUDGETS DO NOT MATCH: {r.run.name} spent {ratio:.1%} of {c.grid.budget:,.12g} "
                f"{c.grid.match}, more than {BUDGET_TOLERANCE:.0%} off"
            )
    warnings += [f"failed: {f.run.name}: {f.reason}" for f in c.failures]
    warnings += [f"no run of {m} finished" for m in c.grid.methods if m not in c.methods]
    for a, b in itertools.combinations(c.trials, 2):
        if a.trial.method == b.trial.method and a.fingerprint == b.fingerprint and a.accuracies:
            warnings.append(
                f"{a.trial.method} did exactly the same with {a.trial.setting} as with {b.trial.setting}: "
                "what was swept is nothing to it, and it had fewer trials than the others"
            )
    return warnings


def _statement(differences: Sequence[Difference]) -> list[Block]:
    if not differences:
        return [Paragraph("There are no two methods to compare.")]
    groups = {
        f"Significant at {LEVEL:.0%} (Holm, {len(differences)} differences looked at):": True,
        "Not significant:": False,
    }
    blocks: list[Block] = []
    for title, wanted in groups.items():
        items = [_sentence(d) for d in differences if d.is_significant is wanted]
        blocks += [Paragraph(title), Bullets(items or ["none"])]
    if any(d.num_seeds == 1 for d in differences):
        blocks.append(Paragraph("With one seed a method, nothing can be significant."))
    return blocks


def _sentence(d: Difference) -> str:
    e = d.estimate
    return (
        f"{d.better} over {d.other}: +{e.mean:.3f} [{e.low:+.3f}, {e.high:+.3f}], adjusted p = {d.adjusted_p:.2g}, "
        f"{d.num_seeds} seed{'s' if d.num_seeds > 1 else ''}"
    )


class Row(NamedTuple):
    """A line of the table of scores; estimates are of the test split."""

    method: str
    setting: str
    num_seeds: int
    sampled: Estimate
    greedy: Estimate
    best_of: Estimate
    entropy: float
    completion_len: float
    guidance: float
    expert_share: float


def score_rows(c: Comparison) -> list[Row]:
    """The base model, then the methods, the best first."""
    rows = []
    for method in c.methods:
        results = c.of(method)
        rows.append(
            Row(
                method,
                results[0].run.trial.setting,
                len(results),
                *_estimates(list(_scores_by_seed(results).values())),
                entropy=float(np.mean([r.entropy for r in results])),
                completion_len=float(np.mean([r.after.completion_len for r in results if r.after])),
                guidance=float(np.mean([r.guidance for r in results])),
                expert_share=float(np.mean([r.expert_share for r in results])),
            )
        )
    return sorted(rows, key=lambda row: -row.sampled.mean)


def score_table(c: Comparison) -> Table:
    header = [
        "method",
        "setting",
        "seeds",
        "accuracy",
        "greedy",
        f"pass@{_num_samples(c)}",
        "entropy",
        "length",
        "guidance",
        "expert tokens",
    ]
    rows = []
    before = {r.run.seed: r.before for r in c.results if r.before}
    if before:
        base = _estimates(list(before.values()))
        rows.append([BASE, "", str(len(before)), *map(_interval, base), "", "", "", ""])
    for row in score_rows(c):
        of = f"{row.num_seeds} of {c.grid.num_seeds}"
        rows.append(
            [
                row.method,
                row.setting,
                str(row.num_seeds) if row.num_seeds == c.grid.num_seeds else of,
                *map(_interval, (row.sampled, row.greedy, row.best_of)),
                f"{row.entropy:.3f}",
                f"{row.completion_len:.1f}",
                f"{row.guidance:.2f}",
                f"{row.expert_share:.0%}",
            ]
        )
    return Table(header, rows)


def score_numbers(c: Comparison) -> Table:
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
        for row in score_rows(c)
    ]
    return Table(header, rows)


def difference_numbers(differences: Sequence[Difference]) -> Table:
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
    """One line a run, for whoever wants to compute something else."""
    scores = ["sampled", "greedy", "best_of", "entropy", "completion_len"]
    header = ["method", "setting", "seed", *scores, "guidance", "expert_share", *UNITS, "folder"]
    rows = []
    for r in c.results:
        assert r.after
        means = [r.after.sampled.mean(), r.after.greedy.mean(), r.after.best_of.mean()]
        numbers = [*means, r.entropy, r.after.completion_len, r.guidance, r.expert_share]
        numbers += [r.spent[unit] for unit in UNITS]
        of = (r.run.trial.method, r.run.trial.setting, str(r.run.seed))
        rows.append([*of, *(repr(float(x)) for x in numbers), str(r.run.folder)])
    return Table(header, rows)


def spending_table(c: Comparison) -> Table:
    """Means over seeds; the budget's deviation is the largest."""
    header = ["method", *(unit.replace("_", " ") for unit in UNITS), "off budget"]
    rows = []
    for method in c.methods:
        spent = [r.spent for r in c.of(method)]
        means = {unit: float(np.mean([s[unit] for s in spent])) for unit in UNITS}
        off = max(abs(s[c.grid.match] / c.grid.budget - 1) for s in spent)
        rows.append([method, *(_amount(x) for x in means.values()), f"{off:.2%}"])
    return Table(header, rows)


def tuning_table(c: Comparison) -> Table:
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


def _scores_by_seed(results: Sequence[Result]) -> dict[int, Scores]:
    return {r.run.seed: r.after for r in results if r.after}


def _estimates(scores: Sequence[Scores]) -> list[Estimate]:
    """Of sampled and greedy accuracy and pass@n; intervals end at 0 and 1."""
    found = []
    for name in ("sampled", "greedy", "best_of"):
        e = estimate(np.stack([getattr(s, name) for s in scores]))
        found.append(e._replace(low=max(0.0, e.low), high=min(1.0, e.high)))
    return found


def _num_samples(c: Comparison) -> int:
    return c.results[0].num_samples if c.results else 0


def _interval(e: Estimate) -> str:
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _amount(x: float) -> str:
    return f"{x:,.0f}" if x < 1e9 else f"{x:.3g}"
