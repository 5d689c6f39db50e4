"""What finished runs have left in their folders, and which trial of a method did best."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from trapo_jax.comparison.trials import TEST, VALIDATION, Run, Trial
from trapo_jax.evaluation.statistics import pass_at_k
from trapo_jax.runs.loggers import EVAL, TRAIN, read_metrics
from trapo_jax.types import UserError

SUMMARY = "summary.json"  # the trainer writes it last
# What a run spends, in the words of `train.budget_unit`: the metric that counts it.
UNITS = {
    "trained_tokens": "tokens/trained",
    "sampled_tokens": "tokens/sampled",
    "flops": "budget/flops",
    "problems": "problems/seen",
    "seconds": "time/budget_secs",
    "steps": "step",
}
TAIL_BYTES = 2**16  # of metrics.jsonl, surely more than a record


class Scores(NamedTuple):
    """An evaluation, problem by problem in the order of their ids."""

    ids: tuple[str, ...]
    greedy: np.ndarray  # float [problems], 0 or 1
    sampled: np.ndarray  # float [problems], share of the samples that are right
    best_of: np.ndarray  # float [problems], pass@n for all n samples
    completion_len: float  # mean, tokens


class Point(NamedTuple):
    """Of a learning curve."""

    spent: Mapping[str, float]  # by unit
    accuracy: float  # sampled, on the validation split


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run has left.

    Attributes:
      run: which.
      spent: by unit.
      curve: from before training to the end.
      before, after: scores on the test split; None of a run that only tunes.
      num_samples: of each problem.
      entropy: nats a token, of the samples on the test split after training.
      guidance: mean share of the expert's solution that rollouts started from.
      expert_share: of the tokens trained.
    """

    run: Run
    spent: Mapping[str, float]
    curve: tuple[Point, ...]
    before: Scores | None
    after: Scores | None
    num_samples: int
    entropy: float
    guidance: float
    expert_share: float


def is_complete(run: Run) -> bool:
    """Whether the run has come to its end, and is not one of fewer steps that is to go on."""
    if not (run.folder / SUMMARY).exists():
        return False
    train = run.config.train
    return train.budget is not None or _last_step(run).get("step", 0) >= train.num_steps


def progress(run: Run) -> float:
    """The share of its budget that a run has spent so far."""
    return 1.0 if is_complete(run) else min(1.0, _last_step(run).get("budget/progress", 0.0))


def _last_step(run: Run) -> dict[str, Any]:
    """The record of the last step so far; empty if there is none."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # the last may be half written
    for line in reversed(lines):
        if b'"kind": "train"' in line and line.startswith(b"{"):
            return json.loads(line)
    return {}


def read_result(run: Run) -> Result:
    """Of a complete run.

    Raises:
      UserError: naming the folder, if it is not a run's of this version.
    """
    try:
        return _read_result(run)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.folder}: not a complete run of this version ({error!r}); delete it to do it again"
        ) from error


def _read_result(run: Run) -> Result:
    records = read_metrics(run.folder)
    steps = {r["step"]: r for r in records if r["kind"] == TRAIN}
    evaluations = [r for r in records if r["kind"] == EVAL]
    spent_at = {0: dict.fromkeys(UNITS, 0.0)}
    spent_at |= {n: {unit: r[name] for unit, name in UNITS.items()} for n, r in steps.items()}
    last = max(steps)
    num_samples = run.config.evaluation.num_samples
    splits = run.config.evaluation.splits
    return Result(
        run=run,
        spent=spent_at[last],
        curve=tuple(
            Point(spent_at[r["step"]], r["eval/accuracy_sampled"])
            for r in evaluations
            if r["split"] == VALIDATION
        ),
        before=_scores(run.folder, TEST, 0, num_samples) if TEST in splits else None,
        after=_scores(run.folder, TEST, last, num_samples) if TEST in splits else None,
        num_samples=num_samples,
        entropy=_number(evaluations[-1]["eval/entropy"]),
        guidance=fmean(r["guidance/ratio_mean"] for r in steps.values()),
        expert_share=steps[last]["tokens/expert_trained"] / max(1, steps[last]["tokens/trained"]),
    )


def _number(value: float | None) -> float:
    """What a log has null for is not a number."""
    return math.nan if value is None else value


def _scores(folder: Path, split: str, step: int, num_samples: int) -> Scores:
    columns = json.loads((folder / "evaluations" / f"{split}_{step}.json").read_text())
    correct = columns["correct"]
    return Scores(
        ids=tuple(columns["id"]),
        greedy=np.array(columns["greedy"], float),
        sampled=np.array(correct, float) / num_samples,
        best_of=np.array([pass_at_k(num_samples, c, num_samples) for c in correct]),
        completion_len=fmean(columns["len"]),
    )


class TrialScore(NamedTuple):
    """How a trial did on the validation split."""

    trial: Trial
    accuracies: tuple[float, ...]  # sampled, of the tuning seeds that finished
    num_failed: int
    fingerprint: tuple  # what only the same run leaves

    @property
    def score(self) -> float:
        """Of the seeds; a trial of which a run failed is worse than any other."""
        return -1.0 if self.num_failed else fmean(self.accuracies)


def pick_trials(runs: Sequence[Run]) -> tuple[list[Trial], list[TrialScore]]:
    """Each method's best trial on the validation split, the first of equals; and all their scores."""
    by_trial: dict[Trial, list[Run]] = {}
    for run in runs:
        by_trial.setdefault(run.trial, []).append(run)
    scores = []
    for trial, of_trial in by_trial.items():
        found = [read_result(run) for run in of_trial if is_complete(run)]
        accuracies = tuple(result.curve[-1].accuracy for result in found)
        fingerprint = tuple((r.entropy, *(p.accuracy for p in r.curve)) for r in found)
        num_failed = len(of_trial) - len(found)
        scores.append(TrialScore(trial, accuracies, num_failed, fingerprint))
    methods = dict.fromkeys(s.trial.method for s in scores)
    best = [
        max((s for s in scores if s.trial.method == method), key=lambda s: s.score)
        for method in methods
    ]
    return [s.trial for s in best if s.score >= 0], scores
