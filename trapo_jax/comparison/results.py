"""Results of complete runs, read from their directories, and selection of the best trial of each method."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from trapo_jax.comparison.grid import TEST, VALIDATION, PlannedRun, Trial
from trapo_jax.evaluation.statistics import pass_at_k
from trapo_jax.files import read_json_object
from trapo_jax.runs.budget import UNITS
from trapo_jax.runs.directory import METRICS, SUMMARY, evaluation_file
from trapo_jax.runs.loggers import EVAL, TRAIN, read_metrics
from trapo_jax.types import UserError

TAIL_BYTES = 2**16  # size of the part of metrics.jsonl to read; larger than any record


class Scores(NamedTuple):
    """Per-problem scores of an evaluation, in the order of problem ids."""

    ids: tuple[str, ...]
    greedy: np.ndarray  # float [problems], 0 or 1
    sampled: np.ndarray  # float [problems], fraction of the samples that are correct
    best_of: np.ndarray  # float [problems], pass@n, where n is the number of samples
    completion_len: float  # mean number of tokens


class CurvePoint(NamedTuple):
    """A point of a learning curve."""

    spent: Mapping[str, float]  # amount by unit
    accuracy: float  # sampled, on the validation split


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a complete run.

    Attributes:
      run: the run.
      spent: amount spent, by unit.
      curve: accuracy on the validation split, from before training to the end.
      before, after: scores on the test split; None for a tuning run.
      num_samples: number of samples per problem.
      entropy: entropy of the samples of the last evaluation, in nats per token.
      guidance: mean guidance ratio of the rollouts.
      expert_share: fraction of the trained tokens that are expert tokens.
    """

    run: PlannedRun
    spent: Mapping[str, float]
    curve: tuple[CurvePoint, ...]
    before: Scores | None
    after: Scores | None
    num_samples: int
    entropy: float
    guidance: float
    expert_share: float


def is_complete(run: PlannedRun) -> bool:
    """Returns whether the run has finished, with at least the number of steps that is requested now."""
    if not (run.folder / SUMMARY).exists():
        return False
    train = run.config.train
    return train.budget is not None or _last_step(run).get("step", 0) >= train.num_steps


def progress(run: PlannedRun) -> float:
    """Returns the fraction of its budget that a run has spent."""
    return 1.0 if is_complete(run) else min(1.0, _last_step(run).get("budget/progress", 0.0))


def _last_step(run: PlannedRun) -> dict[str, Any]:
    """Returns the record of the last step, or an empty dict if there is none."""
    path = run.folder / METRICS
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # The last line may be incomplete.
    for line in reversed(lines):
        if b'"kind": "train"' in line and line.startswith(b"{"):
            return json.loads(line)
    return {}


def read_result(run: PlannedRun) -> Result:
    """Reads the result of a complete run.

    Raises:
      UserError: if the directory is not a complete run directory of this version.
    """
    try:
        return _read_result(run)
    except (OSError, KeyError, TypeError, UserError, ValueError) as error:
        raise UserError(
            f"{run.folder}: not a complete run of this version ({error!r}); delete it to repeat the run"
        ) from error


def _read_result(run: PlannedRun) -> Result:
    records = read_metrics(run.folder)
    steps = {r["step"]: r for r in records if r["kind"] == TRAIN}
    evaluations = [r for r in records if r["kind"] == EVAL]
    spent_at = {0: dict.fromkeys(UNITS, 0.0)}
    spent_at |= {
        n: {name: r[unit.metric] for name, unit in UNITS.items()} for n, r in steps.items()
    }
    last = max(steps)
    num_samples = run.config.evaluation.num_samples
    splits = run.config.evaluation.splits
    return Result(
        run=run,
        spent=spent_at[last],
        curve=tuple(
            CurvePoint(spent_at[r["step"]], r["eval/accuracy_sampled"])
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
    """Converts a number from the log, where null stands for NaN."""
    return math.nan if value is None else value


def _scores(folder: Path, split: str, step: int, num_samples: int) -> Scores:
    columns = read_json_object(evaluation_file(folder, split, step))
    correct = columns["correct"]
    return Scores(
        ids=tuple(columns["id"]),
        greedy=np.array(columns["greedy"], float),
        sampled=np.array(correct, float) / num_samples,
        best_of=np.array([pass_at_k(num_samples, c, num_samples) for c in correct]),
        completion_len=fmean(columns["len"]),
    )


class TrialScore(NamedTuple):
    """Scores of a trial on the validation split."""

    trial: Trial
    accuracies: tuple[float, ...]  # sampled accuracy of each complete run
    num_failed: int
    fingerprint: tuple  # equal for two trials only if their runs were identical

    @property
    def score(self) -> float:
        """Mean accuracy over seeds; -1, which is worse than any accuracy, if a run failed."""
        return -1.0 if self.num_failed else fmean(self.accuracies)


def pick_trials(runs: Sequence[PlannedRun]) -> tuple[list[Trial], list[TrialScore]]:
    """Returns the trial with the best validation accuracy of each method (the first one in a tie), and all scores."""
    by_trial: dict[Trial, list[PlannedRun]] = {}
    for run in runs:
        by_trial.setdefault(run.trial, []).append(run)
    scores = []
    for trial, trial_runs in by_trial.items():
        found = [read_result(run) for run in trial_runs if is_complete(run)]
        accuracies = tuple(result.curve[-1].accuracy for result in found)
        fingerprint = tuple((r.entropy, *(p.accuracy for p in r.curve)) for r in found)
        num_failed = len(trial_runs) - len(found)
        scores.append(TrialScore(trial, accuracies, num_failed, fingerprint))
    methods = dict.fromkeys(s.trial.method for s in scores)
    best = [
        max((s for s in scores if s.trial.method == method), key=lambda s: s.score)
        for method in methods
    ]
    return [s.trial for s in best if s.score >= 0], scores
