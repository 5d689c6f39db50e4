"""Tests the contents of the records of completed runs, and when records are used."""

import json
import shutil

import numpy as np
import pytest

from support.comparisons import make_grid, write_run
from trapo_jax.comparison.grid import Trial
from trapo_jax.comparison.records import collect_result, is_done, load_result
from trapo_jax.comparison.results import read_result
from trapo_jax.types import UserError


def plan(tmp_path, **options):
    return plan_method("trapo", tmp_path, (("method.alpha", "0.2"),), **options)


def plan_method(method, tmp_path, values=(), **options):
    grid = make_grid(tmp_path, methods=(method,), seeds=1, **options)
    (run,) = grid.final_runs([Trial(method, values)])
    return run


def test_a_record_replaces_the_run_directory(tmp_path):
    run = plan(tmp_path)
    assert not is_done(run)
    write_run(run, 0.6)
    expected = read_result(run)
    collect_result(run)
    shutil.rmtree(run.folder)
    assert is_done(run)
    found = load_result(run)
    assert (found.spent, found.curve) == (expected.spent, expected.curve)
    assert found.after.problems == expected.after.problems
    for name in ("sampled", "greedy", "best_of"):
        np.testing.assert_array_equal(getattr(found.after, name), getattr(expected.after, name))
    assert found.code.startswith(("commit ", "0."))
    assert found.processor


def test_a_record_without_sources_has_the_same_scores(tmp_path):
    """Older versions did not record the sources of problems."""
    run = plan(tmp_path)
    write_run(run, 0.6)
    expected = collect_result(run)
    record = json.loads(run.record.read_text())
    for when in ("before", "after"):
        del record["result"][when]["sources"]
    del record["config"]["evaluation.temperature"]
    run.record.write_text(json.dumps(record))
    found = load_result(run)
    np.testing.assert_array_equal(found.after.sampled, expected.after.sampled)
    np.testing.assert_array_equal(found.after.best_of, expected.after.best_of)
    assert found.after.sources == ()


@pytest.mark.parametrize("method", ["sft", "sft_then_grpo", "chord"])
def test_runs_of_all_methods_have_records(method, tmp_path):
    run = plan_method(method, tmp_path)
    write_run(run, 0.6)
    assert collect_result(run).after
    assert is_done(run)


def test_a_record_contains_config_code_and_machine_in_a_few_kilobytes(tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6, entropy=None)
    assert np.isnan(collect_result(run).entropy)
    record = json.loads(run.record.read_text())
    assert (record["method"], record["setting"], record["seed"]) == ("trapo", "alpha=0.2", 0)
    assert record["config"]["method.alpha"] == 0.2
    assert record["machine"].keys() == {"processor", "instructions", "cores"}
    assert "output_dir" not in record["config"]
    assert len(run.record.read_bytes()) < 8_000


def test_a_record_with_another_config_is_rejected_and_the_error_names_the_field(tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6)
    collect_result(run)
    other = plan(tmp_path, overrides=(("method.alpha", "0.2"), ("train.learning_rate", "1")))
    with pytest.raises(UserError, match=r"seed_0\.json: record of a run with train.learning_rate="):
        is_done(other)


def test_a_field_that_is_newer_than_the_record_must_have_its_default(tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6)
    collect_result(run)
    record = json.loads(run.record.read_text())
    del record["config"]["train.adam_b2"]
    run.record.write_text(json.dumps(record))
    assert is_done(run)
    with pytest.raises(UserError, match=r"train\.adam_b2="):
        is_done(plan(tmp_path, overrides=(("train.adam_b2", "0.5"),)))


def test_a_record_is_used_for_a_run_with_another_output_directory(tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6)
    collect_result(run)
    elsewhere = run._replace(config=run.config.model_copy(update={"output_dir": "elsewhere"}))
    assert is_done(elsewhere)


def test_a_longer_run_continues_the_recorded_one(tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6)
    collect_result(run)
    assert not is_done(plan(tmp_path, budget=30.0))


@pytest.mark.parametrize("text", ["{", "{}", '{"config": 3}', "[]"])
def test_a_damaged_record_causes_a_one_line_error(text, tmp_path):
    run = plan(tmp_path)
    write_run(run, 0.6)
    collect_result(run)
    run.record.write_text(text)
    with pytest.raises(UserError, match=r"seed_0\.json: ") as caught:
        load_result(run)
    assert "\n" not in str(caught.value)
