"""Tests that any content in the files of a run or an evaluation is either read or rejected with a one-line error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.any_input import VALUES, changed, value_or_user_error
from trapo_jax.config import Config
from trapo_jax.evaluation.records import key_of, read_samples, sample_of
from trapo_jax.runs.loggers import read_metrics, read_summary
from trapo_jax.runs.report import make_page, read_run
from trapo_jax.train import TrainResult, show_result

SCORES = {
    "eval/accuracy_greedy": 0.5,
    "eval/num_problems": 4,
    "eval/num_samples": 1,
    "eval/temperature": 0.6,
    "eval/x": None,
}
STEP = {
    "step": 1,
    "kind": "train",
    "tokens/trained": 5,
    "tokens/sampled": 6,
    "reward/mean": 0.5,
    "guidance/level_0": 1.0,
    "budget/progress": 0.5,
    "time/sample_secs": 1.0,
    "time/reward_secs": 1.0,
    "time/train_secs": 1.0,
}
EVALUATION = {
    "step": 0,
    "kind": "eval",
    "split": "test",
    "eval/accuracy_greedy": 0.5,
    "eval/accuracy_sampled": 0.5,
    "eval/num_samples": 1,
    "eval/num_samples/s": 2,
    "eval/temperature": 0.6,
    "time/eval_secs": 1.0,
}
ROLLOUT = {
    "step": 1,
    "problem_id": "ab",
    "prompt": "Q",
    "gold": "1",
    "tokens": {"pieces": ["a"], "kinds": "4", "logprobs": [-1.0], "gradient_weights": [0.5]},
}
SAMPLE = {
    "problem_id": "ab",
    "source": "s",
    "is_correct": True,
    "missing": {},
    "truncated": False,
    "completion_len": 3,
    "answer": "1",
    "logprob": -1.0,
    "rewards": {"math": 1.0},
    "sample_index": 0,
    "token_ids": [1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(Config().to_yaml())
    return folder


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    metrics=changed([EVALUATION, STEP, EVALUATION]) | VALUES.map(lambda value: [value]),
    samples=changed([ROLLOUT]) | VALUES.map(lambda value: [value]),
)
def test_any_logs_give_a_report_or_are_rejected(metrics, samples, folder):
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    with value_or_user_error():
        make_page({"runs": [read_run(folder, "run", max_bytes=10_000)]}, title="run")
    with value_or_user_error():
        assert all(isinstance(record, dict) for record in read_metrics(folder))


@given(summary=changed({"test": {"before": SCORES, "after": SCORES}}) | VALUES)
def test_any_summary_is_shown_or_rejected(summary, folder):
    (folder / "summary.json").write_text(json.dumps(summary))
    with value_or_user_error():
        show_result(TrainResult(folder, 1, read_summary(folder)))


@given(
    records=changed([SAMPLE, SAMPLE]) | VALUES.map(lambda value: [value]), end=st.binary(max_size=3)
)
def test_any_samples_of_an_evaluation_are_read_or_rejected(records, end, folder):
    file = folder / "evaluated.jsonl"
    write_lines(file, records)
    file.write_bytes(file.read_bytes() + end)
    with value_or_user_error():
        for record in read_samples(file):
            assert {key_of(record): sample_of(record)}
