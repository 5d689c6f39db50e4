"""Tests the results and learning curves that are read from run directories."""

import numpy as np
import pytest

from support.comparisons import make_comparison, make_grid, write_run
from trapo_jax.comparison.curves import common_grid
from trapo_jax.comparison.document import to_markdown
from trapo_jax.comparison.grid import Trial
from trapo_jax.comparison.records import collect_result
from trapo_jax.comparison.report import make_report
from trapo_jax.comparison.results import progress, read_result
from trapo_jax.evaluation.statistics import pass_at_k
from trapo_jax.types import UserError


def test_a_result_contains_the_values_of_the_run_directory(tmp_path):
    (result,) = make_comparison(tmp_path, {"trapo": 0.6}, seeds=1).results
    assert result.spent["steps"] == 20
    assert result.spent["trained_tokens"] == 2_000
    assert [p.spent["problems"] for p in result.curve] == [0, 2_000]
    assert result.curve[1].accuracy > result.curve[0].accuracy
    assert (result.guidance, result.expert_share, result.entropy) == (0.5, 0.25, 0.5)
    assert result.after.sampled.mean() == pytest.approx(0.6, abs=0.1)
    assert result.before.sampled.mean() == pytest.approx(0.25, abs=0.1)
    # With at least one correct sample among four, pass@4 is 1.
    assert result.after.best_of[result.after.sampled > 0].min() == 1


def test_a_problem_is_scored_by_its_own_number_of_samples(tmp_path):
    more = (("evaluation.num_samples", "4"), ("evaluation.num_samples_by_source", "{hard: 16}"))
    grid = make_grid(tmp_path, methods=("trapo",), seeds=1, overrides=more)
    (run,) = grid.final_runs([Trial("trapo")])
    write_run(run, 0.6)  # Up to 4 samples of each problem are correct.
    result = read_result(run)
    is_hard = np.array(result.after.sources) == "hard"
    assert set(result.after.sampled[~is_hard] * 4) <= {0, 1, 2, 3, 4}
    assert 0 < result.after.sampled[is_hard].max() <= 4 / 16
    assert result.num_samples == 4
    expected = [pass_at_k(16, round(16 * share), 4) for share in result.after.sampled[is_hard]]
    assert result.after.best_of[is_hard].tolist() == expected
    recorded = collect_result(run).after
    for name in ("sources", "numbers", "sampled", "best_of"):
        np.testing.assert_array_equal(getattr(recorded, name), getattr(result.after, name))


def test_progress_ignores_an_incomplete_line(tmp_path):
    (run,) = make_grid(tmp_path, methods=("trapo",), seeds=1).final_runs([Trial("trapo")])
    assert progress(run) == 0
    write_run(run, 0.5)
    (run.folder / "summary.json").unlink()
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]) + lines[12][:30])
    assert progress(run) == 0.5


def test_a_run_of_another_version_causes_a_one_line_error(tmp_path):
    comparison = make_comparison(tmp_path, {"trapo": 0.5}, seeds=2, trapo={"entropy": None})
    assert np.isnan(comparison.results[0].entropy)
    assert "nan" in to_markdown(make_report(comparison, None)[0])
    run = comparison.results[0].run
    (run.folder / "evaluations" / "test_0.json").unlink()
    with pytest.raises(UserError, match=r"seed_0: not a complete run of this version .*; delete"):
        read_result(run)


def test_curves_end_at_the_end_of_the_shortest_run(tmp_path):
    results = make_comparison(tmp_path, {"trapo": 0.6}, seeds=2).results
    x, curves = common_grid(results, "flops")
    assert (x[0], x[-1]) == (0, 2_000)
    assert curves[:, -1].tolist() == [r.curve[-1].accuracy for r in results]
    middle = [(r.curve[0].accuracy + r.curve[1].accuracy) / 2 for r in results]
    assert curves[:, len(x) // 2] == pytest.approx(middle)
