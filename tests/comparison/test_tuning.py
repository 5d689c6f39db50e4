"""Tests the selection of the best trial."""

from dataclasses import replace

from support.comparisons import LEARNING_RATES, make_grid, write_run
from trapo_jax.comparison.records import collect_result
from trapo_jax.comparison.tuning import best_trials, score_trials


def test_the_best_trial_on_validation_is_chosen(tmp_path):
    grid = make_grid(tmp_path, LEARNING_RATES, seeds=1)
    trials = [trial for method_trials in grid.trials().values() for trial in method_trials]
    runs = grid.tuning_runs(trials, grid.tuning_seeds)
    for run, accuracy in zip(runs[:3], (0.3, 0.7, 0.6), strict=True):
        write_run(run, accuracy)
    scores = score_trials(runs)  # The second run of GRPO is missing, so it counts as failed.
    assert [s.trial for s in best_trials(scores)] == [trials[1], trials[2]]
    assert [s.num_failed for s in scores] == [0, 0, 0, 1]


def test_the_best_quarter_of_trials_is_compared_with_more_seeds(tmp_path):
    rates = "learning_rate=1e-4,2e-4,3e-4,4e-4,5e-4,6e-4,7e-4,8e-4"
    grid = make_grid(tmp_path, rates, methods=("grpo",), tuning_seeds=3)
    trials = grid.trials()["grpo"]
    first = grid.tuning_runs(trials, grid.tuning_seeds[:1])
    for run, accuracy in zip(first, (0.1, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1), strict=True):
        write_run(run, accuracy)
    finalists = [s.trial for s in best_trials(score_trials(first), share=0.25)]
    assert finalists == [trials[1], trials[2]]
    more = grid.tuning_runs(finalists, grid.tuning_seeds[1:])
    for run in more:
        write_run(run, 0.2 if run.trial == trials[1] else 0.7)
    scores = score_trials([*first, *more])
    assert [s.trial for s in best_trials(scores)] == [trials[2]]
    assert sorted(len(s.accuracies) for s in scores) == [1] * 6 + [3] * 2


def test_a_run_that_exports_its_best_checkpoint_is_scored_by_that_checkpoint(tmp_path):
    early = (("checkpoint.keep_best", "1"), ("checkpoint.load_best_model_at_end", "true"))
    for overrides, accuracy in (((), 0.5), (early, 0.9)):
        grid = make_grid(tmp_path / str(accuracy), methods=("grpo",), overrides=overrides)
        (run,) = grid.tuning_runs(grid.trials()["grpo"], grid.tuning_seeds)
        write_run(run, 0.5)
        result = collect_result(run)
        curve = [result.curve[0]._replace(accuracy=x) for x in (1.0, 0.9, 0.5)]
        assert replace(result, curve=curve).validation_accuracy == accuracy
