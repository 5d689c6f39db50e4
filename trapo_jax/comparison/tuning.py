"""Selection of the best trial of each method by its runs on the validation split."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from trapo_jax.comparison.grid import PlannedRun, Trial
from trapo_jax.comparison.records import collect_result, is_done


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
        found = [collect_result(run) for run in trial_runs if is_done(run)]
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
