"""Selection of the best trial."""

from support.comparisons import LEARNING_RATES, make_grid, write_run
from trapo_jax.comparison.tuning import pick_trials


def test_the_best_trial_on_validation_is_chosen(tmp_path):
    grid = make_grid(tmp_path, LEARNING_RATES, seeds=1)
    trials = [trial for method_trials in grid.trials().values() for trial in method_trials]
    runs = grid.tuning_runs(trials)
    for run, accuracy in zip(runs[:3], (0.3, 0.7, 0.6), strict=True):
        write_run(run, accuracy)
    chosen, scores = pick_trials(runs)  # The second run of GRPO failed.
    assert chosen == [trials[1], trials[2]]
    assert [s.num_failed for s in scores] == [0, 0, 0, 1]
