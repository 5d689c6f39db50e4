"""Tests which symptoms cause warnings or stop a run, and when they do so."""

import shutil
import signal
import subprocess
import sys
import textwrap
import time
from subprocess import PIPE

import pytest

from trapo_jax.runs.monitoring import (
    WARN_AFTER_FIRST_STEPS,
    WARN_AFTER_STEPS,
    Health,
    TrainingFailed,
    check_learned,
    check_space,
    unanswered,
    warnings_of_run,
)

GOOD = {
    "loss/trsft": 1.0,
    "loss/policy_gradient": -0.1,
    "loss/total": 0.9,
    "optimizer/grad_norm": 1.0,
    "optimizer/skipped": 0.0,
    "optimizer/skipped_in_a_row": 0,
    "policy/logprob_gap_mean": 1e-6,
    "sampling/stale_tokens": 0,
    "batch/completion_tokens": 100,
    "completion/truncated": 0.5,
    "reward/groups_with_signal": 0.25,
    "reward/sampled_positive": 0.5,
}


def health():
    return Health("math", max_logprob_gap=0.2, max_skipped_steps=3)


def test_a_healthy_step_gives_no_warnings():
    watch = health()
    assert [watch.observe(step, GOOD) for step in range(5)] == [[]] * 5


def test_a_skipped_update_is_reported_with_its_cause():
    values = {
        **GOOD,
        "optimizer/skipped": 1.0,
        "optimizer/skipped_in_a_row": 1,
        "loss/trsft": float("nan"),
        "loss/total": float("nan"),
    }
    (warning,) = health().observe(7, values)
    assert warning == "step 7: the update was skipped because loss/trsft was not finite"
    all_finite = {**values, "loss/trsft": 1.0, "loss/total": 1.0, "optimizer/grad_norm": 99.0}
    (warning,) = health().observe(7, {**all_finite, "optimizer/grad_norm": float("inf")})
    assert warning == "step 7: the update was skipped because the gradient was not finite"
    (warning,) = health().observe(7, all_finite)
    assert "the gradient norm of 99 exceeds the method's limit" in warning
    with pytest.raises(
        TrainingFailed, match=r"step 9: train.max_skipped_steps=3 .*loss/trsft was not finite"
    ):
        health().observe(9, {**values, "optimizer/skipped_in_a_row": 3})


def test_a_run_without_trained_tokens_fails(tmp_path):
    with pytest.raises(TrainingFailed, match=r"step 9: no tokens were trained on, .*data\.json"):
        check_learned(tmp_path, 9, 0, state=None)


def test_a_large_logprob_gap_stops_the_run():
    """If the batch contains stale tokens, the error names them as a possible cause."""
    stale = {**GOOD, "policy/logprob_gap_mean": 0.3, "sampling/stale_tokens": 12}
    with pytest.raises(TrainingFailed, match=r"0.2; 12 tokens .* sampling.max_staleness=0"):
        health().observe(2, stale)
    with pytest.raises(TrainingFailed, match=r"step 2: .* 0.3 .*limits.max_logprob_gap=0.2"):
        health().observe(2, {**GOOD, "policy/logprob_gap_mean": 0.3})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("completion/truncated", 1.0, "sampling.max_completion_length"),
        ("reward/groups_with_signal", 0.0, "nothing is learned from them"),
        ("reward/sampled_positive", 0.0, "no sampled rollout was correct"),
    ],
)
def test_persistent_symptoms_are_reported_once(name, value, text):
    watch, bad = health(), {**GOOD, name: value}
    steps = iter(range(1, 1000))
    for _ in range(WARN_AFTER_FIRST_STEPS - 1):
        assert watch.observe(next(steps), bad) == []
    (warning,) = watch.observe(next(steps), bad)
    assert f"step {WARN_AFTER_FIRST_STEPS}: for {WARN_AFTER_FIRST_STEPS} steps, " in warning
    assert text in warning
    assert watch.observe(next(steps), bad) == []
    assert watch.observe(next(steps), GOOD) == []
    warnings = [watch.observe(next(steps), bad) for _ in range(WARN_AFTER_STEPS)]
    assert [len(step_warnings) for step_warnings in warnings] == [0] * (WARN_AFTER_STEPS - 1) + [1]


def test_steps_without_sampling_give_no_warnings():
    watch = health()
    sft = {
        **GOOD,
        "batch/completion_tokens": 0,
        "completion/truncated": 0.0,
        "reward/groups_with_signal": 0.0,
    }
    del sft["reward/sampled_positive"]
    num_steps = WARN_AFTER_FIRST_STEPS + 1
    assert [watch.observe(step, sft) for step in range(num_steps)] == [[]] * num_steps
    assert warnings_of_run([sft] * num_steps) == []


def test_one_cause_gives_only_one_warning():
    """Without guidance, rewards of 0 for all rollouts also mean that all rewards are equal."""
    watch, steps = health(), range(1, WARN_AFTER_FIRST_STEPS + 2)
    zero = {**GOOD, "reward/sampled_positive": 0.0, "reward/groups_with_signal": 0.0}
    (warning,) = [warning for step in steps for warning in watch.observe(step, zero)]
    assert "no sampled rollout was correct" in warning


def test_responses_without_answers_are_reported_once_at_the_first_evaluation_or_step():
    silent = {**GOOD, "reward/sampled_positive": 0.04, "reward/no_answer": 0.9}
    (warning,) = health().observe(1, silent)
    assert warning.startswith(
        "step 1: the reward function math found no answer in 90% of the responses"
    )
    assert "50% are truncated" in warning
    for way_out in ("prompt_suffix", "max_completion_length", "sampling.temperature"):
        assert way_out in warning
    watch = health()
    evaluation = {"eval/accuracy_sampled": 0.0, "eval/truncated": 0.0, "eval/no_answer": 0.6}
    (warning,) = watch.observe_evaluation(evaluation)
    assert warning.endswith("or lower evaluation.temperature")
    assert watch.observe_evaluation(evaluation) == watch.observe(1, silent) == []


@pytest.mark.parametrize(
    ("accuracy", "no_answer"),
    # None means that the reward function does not look for an answer.
    [(0.05, 0.9), (0.0, 0.5), (0.0, None)],
)
def test_other_causes_of_low_accuracy_are_not_blamed_on_missing_answers(accuracy, no_answer):
    assert not unanswered(
        "sampling", function="math", accuracy=accuracy, no_answer=no_answer, truncated=1.0
    )


@pytest.mark.parametrize(
    ("positive", "with_signal", "text"),
    [
        ([0.0, 0.0], [1.0, 1.0], "in all 2 steps, no sampled rollout was correct"),
        ([0.0, 0.0], [0.0, 0.0], "in all 2 steps, no sampled rollout was correct"),
        ([0.0, 1.0], [0.0, 0.0], "in all 2 steps, all rewards of each problem were equal"),
        ([0.0, 0.1], [0.0, 0.1], None),
    ],
)
def test_a_run_ends_with_a_warning_about_what_was_wrong_in_all_steps(positive, with_signal, text):
    names = ("reward/sampled_positive", "reward/groups_with_signal")
    records = [dict(zip(names, values, strict=True)) for values in zip(positive, with_signal, strict=True)]  # fmt: skip
    warnings = warnings_of_run([{"kind": "eval"}, *records])
    assert [warning.startswith(text) for warning in warnings] == [True] * (text is not None)


def test_insufficient_disk_space_is_reported(tmp_path):
    check_space(tmp_path, 1, "a checkpoint")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(TrainingFailed, match=rf"output_dir={tmp_path}: .* a checkpoint needs"):
        check_space(tmp_path, 2 * free, "a checkpoint")


BUSY = """
import time
from trapo_jax.runs.monitoring import Interrupt
interrupt = Interrupt()
print("started", flush=True)
while not interrupt.received:
    time.sleep(0.01)
print("finishing", flush=True)
9**9**9  # As in a compiled program, no signals are handled until this finishes.
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_terminates_the_process_immediately(second):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "finishing\n"
        process.send_signal(second)
        assert process.wait() == -second


def started(code):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


WAITING = BUSY.replace("9**9**9", "time.sleep(0.1)")
HANG_UP = "import signal; signal.signal(signal.SIGHUP, signal.{})\n"


@pytest.mark.slow
def test_a_closing_terminal_that_sends_two_hangup_signals_is_a_request_to_stop():
    with started(HANG_UP.format("SIG_DFL") + WAITING) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "finishing\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 0


@pytest.mark.slow
def test_a_process_started_with_nohup_ignores_a_closing_terminal():
    with started(HANG_UP.format("SIG_IGN") + WAITING) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.wait()
        assert process.returncode == 0


@pytest.mark.slow
def test_a_process_that_was_suspended_is_not_mistaken_for_a_stuck_one():
    """The watchdog thread waits 0.5 s at a time, and the process is suspended for longer than the watchdog's limit."""
    code = """
        import time
        from trapo_jax.runs.monitoring import Watchdog
        watchdog = Watchdog(2.0)
        print("started", flush=True)
        input()
        watchdog.beat("resumed")
        print("resumed", flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=PIPE, stdout=PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "resumed\n"
        assert process.wait() == 0
