"""Reads the results of completed runs from their directories."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from trapo_jax.comparison.grid import TEST, VALIDATION, PlannedRun
from trapo_jax.config import ScoringConfig
from trapo_jax.evaluation.statistics import pass_at_k
from trapo_jax.inputs.files import read_json_object
from trapo_jax.runs.budget import UNITS
from trapo_jax.runs.directory import METRICS, SUMMARY, evaluation_file
from trapo_jax.runs.loggers import EVAL, TRAIN, read_metrics
from trapo_jax.types import UserError

TAIL_BYTES = 2**16  # Number of bytes to read from the end of metrics.jsonl; larger than any record.


class Scores(NamedTuple):
    """Per-problem scores of an evaluation, ordered by problem id."""

    problems: str  # hash of the problem ids
    sources: tuple[str, ...]  # source of each problem; empty if unknown
    numbers: np.ndarray  # int [problems], number of samples
    greedy: np.ndarray  # float [problems], 0 or 1
    sampled: np.ndarray  # float [problems], fraction of correct samples
    best_of: np.ndarray  # float [problems], pass@n, where n is the smallest number of samples
    completion_len: float  # mean number of tokens


def make_scores(
    problems: str,
    sources: Sequence[str],
    numbers: Sequence[int],
    *,
    greedy: Sequence[int],
    correct: Sequence[int],
    completion_len: float,
) -> Scores:
    """Computes the scores from the number of samples of each problem and the number of correct ones among them."""
    fewest = min(numbers)
    return Scores(
        problems=problems,
        sources=tuple(sources),
        numbers=np.array(numbers),
        greedy=np.array(greedy, float),
        sampled=np.array(correct) / np.array(numbers),
        best_of=np.array([pass_at_k(n, c, fewest) for n, c in zip(numbers, correct, strict=True)]),
        completion_len=completion_len,
    )


class CurvePoint(NamedTuple):
    """A point of a learning curve."""

    spent: Mapping[str, float]  # amount spent, keyed by unit
    accuracy: float  # sampled accuracy on the validation split


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a completed run.

    Attributes:
      run: the run.
      spent: amount spent, keyed by unit.
      curve: accuracy on the validation split, from before training to the end.
      before, after: scores on the test split; None for a tuning run.
      num_samples: number of samples per problem; the smallest number if it differs between problems.
      entropy: entropy of the samples in the last evaluation, in nats per token.
      guidance: mean guidance ratio of the rollouts.
      expert_share: fraction of the trained tokens that are expert tokens.
      code: commit or version of the code that executed the run.
      processor: processor of the machine that executed the run.
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
    code: str = ""
    processor: str = ""

    @property
    def validation_accuracy(self) -> float:
        """The exported model's accuracy on the validation split."""
        accuracies = [point.accuracy for point in self.curve]
        if self.run.config.checkpoint.load_best_model_at_end:
            return max(accuracies[1:] or accuracies)  # The first one was measured before training.
        return accuracies[-1]


def is_complete(run: PlannedRun) -> bool:
    """Returns whether the run has finished, with at least as many steps as are now requested."""
    if not (run.folder / SUMMARY).exists():
        return False
    train = run.config.train
    return train.budget is not None or _last_step(run).get("step", 0) >= train.num_steps


def progress(run: PlannedRun) -> float:
    """Returns the fraction of a run's budget that has been spent so far, according to the run directory."""
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
    """Reads the result of a completed run.

    Raises:
      UserError: if the directory is not a complete run directory written by this version of trapo_jax.
    """
    try:
        return _read_result(run)
    except (OSError, KeyError, TypeError, UserError, ValueError) as error:
        raise UserError(
            f"{run.folder}: not a complete run of this version of trapo_jax ({error!r}); delete it to repeat the run"
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
    scoring = run.config.evaluation
    before, after = (
        _scores(run.folder, TEST, step, scoring) if TEST in scoring.splits else None
        for step in (0, last)
    )
    return Result(
        run=run,
        spent=spent_at[last],
        curve=tuple(
            CurvePoint(spent_at[r["step"]], r["eval/accuracy_sampled"])
            for r in evaluations
            if r["split"] == VALIDATION
        ),
        before=before,
        after=after,
        num_samples=int(min(after.numbers)) if after else scoring.num_samples,
        entropy=_number(evaluations[-1]["eval/entropy"]),
        guidance=fmean(r["guidance/ratio_mean"] for r in steps.values()),
        expert_share=steps[last]["tokens/expert_trained"] / max(1, steps[last]["tokens/trained"]),
    )


def _number(value: float | None) -> float:
    """Converts a number from the log, where null stands for NaN."""
    return math.nan if value is None else value


def _scores(folder: Path, split: str, step: int, scoring: ScoringConfig) -> Scores:
    columns = read_json_object(evaluation_file(folder, split, step))
    return make_scores(
        problems=hashlib.sha256(" ".join(columns["id"]).encode()).hexdigest(),
        sources=columns["source"],
        numbers=[scoring.num_samples_of(source) for source in columns["source"]],
        greedy=columns["greedy"],
        correct=columns["correct"],
        completion_len=fmean(columns["len"]),
    )
