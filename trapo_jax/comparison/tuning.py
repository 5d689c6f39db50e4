"""Scores trials on the validation split, and selects the best ones."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from trapo_jax.comparison.grid import PlannedRun, Trial
from trapo_jax.comparison.records import collect_result, is_done


class TrialScore(NamedTuple):
    """Scores of a trial on the validation split."""

    trial: Trial
    accuracies: tuple[float, ...]  # one per completed run; see `Result.validation_accuracy`
    num_failed: int
    fingerprint: tuple  # equal for two trials only if their runs had identical results

    @property
    def score(self) -> float:
        """The mean accuracy over seeds, or -1 (worse than any accuracy) if a run failed."""
        return -1.0 if self.num_failed else fmean(self.accuracies)


def score_trials(runs: Sequence[PlannedRun]) -> list[TrialScore]:
    """Returns the scores of all trials, in the order of their first runs."""
    by_trial: dict[Trial, list[PlannedRun]] = {}
    for run in runs:
        by_trial.setdefault(run.trial, []).append(run)
    scores = []
    for trial, trial_runs in by_trial.items():
        found = [collect_result(run) for run in trial_runs if is_done(run)]
        accuracies = tuple(result.validation_accuracy for result in found)
        fingerprint = tuple((r.entropy, *(p.accuracy for p in r.curve)) for r in found)
        num_failed = len(trial_runs) - len(found)
        scores.append(TrialScore(trial, accuracies, num_failed, fingerprint))
    return scores


def best_trials(scores: Sequence[TrialScore], *, share: float = 0.0) -> list[TrialScore]:
    """Returns the best trials of each method. Ties are broken in favor of earlier trials.

    For each method, only the trials with the largest number of runs are considered. Trials with a failed run are never
    returned.

    Args:
      scores: scores of all trials.
      share: fraction of a method's trials to return, rounded up; at least one trial is returned.
    """
    best = []
    for method in dict.fromkeys(s.trial.method for s in scores):
        candidates = [s for s in scores if s.trial.method == method]
        num_runs = max(len(s.accuracies) + s.num_failed for s in candidates)
        complete = [s for s in candidates if len(s.accuracies) == num_runs]
        count = max(1, math.ceil(share * len(candidates)))
        best += sorted(complete, key=lambda s: -s.score)[:count]
    return best
