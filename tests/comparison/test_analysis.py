"""Tests the differences, warnings, and report of comparisons with synthetic results."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from support.comparisons import (
    LEARNING_RATES,
    NUM_PROBLEMS,
    NUM_SAMPLES,
    make_comparison,
    make_grid,
    write_run,
)
from trapo_jax import compare
from trapo_jax.comparison import experiment
from trapo_jax.comparison.analysis import (
    Comparison,
    accuracy_by_source,
    find_differences,
    find_warnings,
    score_methods,
)
from trapo_jax.comparison.curves import plot_curves
from trapo_jax.comparison.document import Image, to_html, to_markdown, write_csv
from trapo_jax.comparison.report import make_report
from trapo_jax.comparison.run_pool import Failure
from trapo_jax.comparison.tuning import score_trials
from trapo_jax.types import UserError


def verdicts(comparison, margin=0.05):
    """Returns, for each pair of methods, the verdicts on the differences in mean and in median."""
    return {
        (d.better, d.other): tuple(d.verdict(x, margin) for x in (d.mean, d.median))
        for d in find_differences(comparison)
    }


@pytest.mark.slow
def test_only_clear_differences_are_significant(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.3, "trapo": 0.9, "sft": 0.31}, seeds=12)
    assert verdicts(comparison, margin=0.01) == {
        ("trapo", "grpo"): ("trapo", "trapo"),
        ("trapo", "sft"): ("trapo", "trapo"),
        ("sft", "grpo"): ("undecided", "undecided"),
    }
    assert score_methods(comparison)[0].method == "trapo"
    assert find_warnings(comparison) == []
    (clear,) = (d for d in find_differences(comparison) if (d.better, d.other) == ("trapo", "grpo"))
    assert clear.mean.value == pytest.approx(0.6, abs=0.05)
    text = to_markdown(make_report(comparison, None)[0])
    assert f"| trapo | grpo | 12 | +{clear.mean.value:.3f} [+{clear.mean.low:.3f}" in text


def test_methods_whose_difference_is_within_the_margin_are_equivalent(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.5, "trapo": 0.5}, seeds=12)
    ((mean, median),) = verdicts(comparison, margin=0.15).values()
    # Only the interval of the mean allows for failing seeds among those that were not run.
    assert (mean, median) == ("undecided", "equivalent")


def test_the_mean_of_sources_gives_every_source_the_same_weight(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.3, "trapo": 0.7})
    results = comparison.results_of("trapo")
    by_source = accuracy_by_source(results)
    values = np.stack([r.after.sampled for r in results])
    is_hard = np.arange(NUM_PROBLEMS) % 3 == 0
    hard, easy = values[:, is_hard].mean(), values[:, ~is_hard].mean()
    expected = {"easy": easy, "hard": hard, "mean of sources": (hard + easy) / 2}
    assert by_source == pytest.approx(expected)
    # There are more easy problems than hard ones.
    assert by_source["mean of sources"] != pytest.approx(values.mean())
    text = to_markdown(make_report(comparison, None)[0])
    table = text.split("| method | easy | hard | mean of sources |")[1]
    assert table.index(f"| trapo | {easy:.3f} | {hard:.3f} | ") < table.index("| grpo | ")


def test_the_report_states_the_sampling_settings_for_evaluation(tmp_path):
    text = to_markdown(make_report(make_comparison(tmp_path, {"trapo": 0.7}), None)[0])
    assert f"the accuracy of {NUM_SAMPLES} samples per problem at temperature 1." in text


def test_with_one_seed_nothing_is_significant(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.1, "trapo": 0.9}, seeds=1)
    assert set(verdicts(comparison).values()) == {("one seed: no test",) * 2}
    text = to_markdown(make_report(comparison, None)[0])
    assert (
        "**Warning: this is a smoke test, not a result: 1 seed per method, but at least 6 are needed**"
        in text
    )


@pytest.mark.slow
def test_a_method_with_a_failing_seed_needs_ten_seeds(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.3, "trapo": 0.8}, seeds=7)
    assert find_warnings(comparison) == []
    results = [
        replace(r, after=r.before) if (r.run.trial.method, r.run.seed) == ("trapo", 3) else r
        for r in comparison.results
    ]
    failing = replace(comparison, results=results)
    (warning,) = find_warnings(failing)
    assert warning.endswith(
        "7 seeds per method, but at least 10 are needed, because at least one run of trapo failed"
    )
    assert [row.num_failed for row in score_methods(failing)] == [1, 0]
    assert "| 0.25" in to_markdown(make_report(failing, None)[0])  # the worst seed


def test_every_seed_is_shown(tmp_path):
    comparison = make_comparison(tmp_path, {"trapo": 0.6}, seeds=3)
    text = to_markdown(make_report(comparison, None)[0])
    accuracies = [f"{r.after.sampled.mean():.3f}" for r in comparison.results]
    assert f"| trapo | {' | '.join(accuracies)} |" in text


def test_only_complete_runs_are_counted_as_seeds(tmp_path):
    whole = make_comparison(tmp_path, {"grpo": 0.1, "trapo": 0.9})
    assert find_warnings(whole) == []
    part = [r for r in whole.results if r.run.seed < 2 or r.run.trial.method == "grpo"]
    assert (
        "2 seeds per method, but at least 6 are needed"
        in find_warnings(replace(whole, results=part))[0]
    )


def test_budgets_that_do_not_match_cause_warnings(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.5, "trapo": 0.5}, trapo={"overspent": 0.05})
    warnings = find_warnings(comparison)
    assert len(warnings) == 10
    assert all(w.startswith("BUDGETS DO NOT MATCH: trapo, seed") for w in warnings)
    assert "5.00%" in to_markdown(make_report(comparison, None)[0])


def test_methods_scored_on_different_problems_are_not_compared(tmp_path):
    with pytest.raises(
        UserError, match=r"trapo/as_configured/seed_\d.json: scored on different problems"
    ):
        find_differences(
            make_comparison(tmp_path, {"grpo": 0.5, "trapo": 0.5}, trapo={"problems": "x"})
        )


def test_trials_with_identical_results_cause_a_warning(tmp_path):
    grid = make_grid(tmp_path, LEARNING_RATES, methods=("grpo",), seeds=5)
    runs = grid.tuning_runs(grid.trials()["grpo"], grid.tuning_seeds)
    for run in runs:
        write_run(run, 0.5)
    scores = score_trials(runs)
    *_, missing, warning = find_warnings(Comparison(grid, "", [], [], scores))
    assert missing == "no run of grpo is complete"
    assert (
        "grpo gave identical results with learning_rate=1e-4 and with learning_rate=3e-4" in warning
    )


def test_messages_of_failed_runs_are_escaped_in_the_report(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.5}, failures=[0])
    document = make_report(comparison, None)[0]
    page, text = to_html(document), to_markdown(document)
    for report in (page, text):
        assert "failed: grpo, seed 0: error: &lt;script" in report
        assert "<script" not in report


@pytest.mark.slow
def test_all_report_files_have_the_same_numbers(tmp_path):
    comparison = make_comparison(tmp_path, {"grpo": 0.4, "trapo": 0.6})
    picture = Image(tmp_path / "curves.png", "curves")
    plot_curves(picture.path, comparison.results)
    document, tables = make_report(comparison, picture)
    page = to_html(document)
    assert "data:image/png;base64,iVBOR" in page
    assert page.count("<table>") == 6
    write_csv(tmp_path / "runs.csv", tables["runs.csv"])
    with open(tmp_path / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    trapo_scores = [float(row["sampled"]) for row in rows if row["method"] == "trapo"]
    best = score_methods(comparison)[0]
    assert np.mean(trapo_scores) == pytest.approx(best.sampled.value)
    assert f"{best.sampled.value:.3f} [{best.sampled.low:.3f}" in page
    assert best.sampled.low < best.sampled.value < best.sampled.high


def test_the_command_tunes_and_trains_with_different_seeds_and_reports_failures(
    tmp_path, monkeypatch, capsys
):
    grid = []

    def execute_fake_runs(runs, **_):
        grid.append(runs)
        failed = [run for run in runs if (run.trial.method, run.seed) == ("grpo", 1)]
        for run in runs:
            if run not in failed:
                write_run(run, 0.7 if run.config.train.learning_rate == 3e-4 else 0.3)
        return [Failure(run, "error: no space") for run in failed]

    monkeypatch.setattr(experiment, "check_train_steps", lambda *_: "cpu")
    monkeypatch.setattr(experiment, "execute_runs", execute_fake_runs)
    arguments = ["--methods", "trapo,grpo", "--seeds", "2", "--match", "steps", "--budget", "20"]
    arguments += ["--sweep", LEARNING_RATES, "--out", str(tmp_path / "out")]
    assert compare.main([*arguments, f"evaluation.num_samples={NUM_SAMPLES}"]) == 1
    tuning, final = grid
    assert [run.seed for run in tuning] == [1000] * 4
    assert {(run.trial.setting, run.seed) for run in final} == {
        ("learning_rate=3e-4", 0),
        ("learning_rate=3e-4", 1),
    }
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "failed: grpo (learning_rate=3e-4), seed 1: error: no space" in text
    assert "| grpo | learning_rate=3e-4 | 1 of 2 |" in text
    assert text.count("| chosen |") == 2
    assert f"    python -m trapo_jax.compare {' '.join(arguments)}" in text
    assert text in capsys.readouterr().out
