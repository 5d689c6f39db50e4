"""Tests progress output (phase, count, rate, and time left) with a clock that the tests control."""

import jax
import jax.numpy as jnp
import pytest

from trapo_jax.runs.console import Console
from trapo_jax.runs.monitoring import COMPILATION, CompilationListener
from trapo_jax.runs.progress import (
    MAX_SECS,
    MIN_SECS,
    Activity,
    LinePacer,
    RunEstimate,
    describe_secs,
)
from trapo_jax.types import SamplingProgress

VALUES = {
    "loss/total": -0.05216,
    "reward/sampled_mean": 17 / 32,
    "reward/num_sampled": 32,
    "reward/num_right": 17,
    "reward/unguided_mean": 5 / 12,
    "reward/num_unguided": 12,
    "guidance/ratio_mean": 0.21,
    "guidance/ratio_max": 0.2375,
    "completion/len_mean": 1234.5,
    "time/tokens_per_sec": 123_456.0,
}


EVALUATION = {
    "eval/accuracy_greedy": 0.25,
    "eval/accuracy_sampled": 0.333,
    "eval/num_problems": 8,
    "eval/num_samples": 4,
    "eval/pass@4": 0.5,
    "eval/temperature": 0.6,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def sampled(num_graded, num_tokens, phase="sampling"):
    return SamplingProgress(phase, num_graded, num_tokens, 0)


def test_a_line_has_the_phase_the_count_the_rate_and_the_time_left():
    activity = Activity("evaluating test", 2304, now=100.0)
    activity.advance(SamplingProgress("prefilling", 0, 0, 2048))
    assert activity.describe(101.0) == (
        "evaluating test: prefilling, 2,048 tokens, 0 of 2,304 samples"
    )
    activity.advance(sampled(0, 1000))
    assert activity.describe(102.0) == "evaluating test: 0 of 2,304 samples, 500 tokens/s"
    activity.advance(sampled(576, 9000))
    assert activity.describe(110.0) == (
        "evaluating test: 576 of 2,304 samples, 1,000 tokens/s, 30 s left"
    )
    activity.advance(sampled(1727, 0, "grading"))
    assert activity.describe(110.0) == (
        "evaluating test: grading, 2,303 of 2,304 samples, 0 s left"
    )


def test_compilations_affect_neither_the_rate_nor_the_time_left():
    activity = Activity("step 1", 64, now=0.0)
    activity.set_compiling(True, now=1.0)
    assert activity.describe(9.0) == "step 1: compiling, 0 of 64 samples"
    assert activity.describe(20.0) == "step 1: compiling for 19 s, 0 of 64 samples"
    activity.set_compiling(False, now=21.0)
    activity.advance(sampled(16, 300))
    assert activity.describe(24.0) == "step 1: 16 of 64 samples, 75 tokens/s, 12 s left"


def test_an_activity_without_samples_shows_its_name_and_its_duration():
    activity = Activity("step 3: updating the parameters", 0, now=0.0)
    assert activity.describe(1.0) == "step 3: updating the parameters"
    activity.set_compiling(True, now=1.0)
    assert activity.describe(2.0) == "step 3: updating the parameters: compiling"
    assert activity.describe(20.0) == "step 3: updating the parameters: compiling, 20 s"
    activity.set_compiling(False, now=21.0)
    assert activity.describe(30.0) == "step 3: updating the parameters: 30 s"


def test_what_is_sampled_is_shown_until_the_first_sample_is_graded():
    activity = Activity("evaluating test", 12, 0.0, "6 problems, 1 + 1 samples each")
    assert activity.describe(0.0) == "evaluating test: starting, 6 problems, 1 + 1 samples each"
    activity.advance(sampled(6, 100))
    assert activity.describe(1.0) == "evaluating test: 6 of 12 samples, 100 tokens/s, 1 s left"


@pytest.mark.parametrize(("num_samples", "enough"), [(12, 3), (10_000, 64)])
def test_the_time_left_is_not_estimated_from_the_first_samples(num_samples, enough):
    """The first samples to be graded are the shortest."""
    activity = Activity("evaluating test", num_samples, now=0.0)
    activity.advance(sampled(enough - 1, 1000))
    assert "left" not in activity.describe(10.0)
    activity.advance(sampled(1, 10))
    assert "left" in activity.describe(10.0)


def test_the_rest_of_a_run_is_estimated_after_its_first_step_without_compilations():
    estimate = RunEstimate()
    estimate.add_final_evaluation(30.0)
    estimate.add_compilation(90.0, 50.0)  # compilation for the evaluation before training
    estimate.add_compilation(120.0, 20.0)
    assert estimate.secs_left(1, 10, step_secs=25.0, now=125.0) == 9 * 5.0 + 30.0
    # The estimate includes a validation of 4 seconds after every step.
    assert estimate.secs_left(2, 10, step_secs=6.0, now=135.0) == 8 * 7.5 + 30.0


def test_a_resumed_run_is_estimated_from_the_steps_of_its_process():
    assert RunEstimate().secs_left(8, 10, step_secs=5.0, now=100.0) == 10.0


def test_the_estimate_of_a_run_includes_the_final_evaluation(capsys):
    clock = Clock()
    console = Console(3, clock=clock)
    console.begin("evaluating test", 16)
    console.set_compiling(True)
    clock.now += 8.0
    console.set_compiling(False)
    clock.now += 12.0
    console.evaluated(0, "test", EVALUATION)
    clock.now += 10.0
    console.step(1, VALUES | {"budget/progress": 1 / 3}, secs=10.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith("  32 s left")


def test_a_long_update_is_not_silent(capsys):
    """The longer the update takes, the less frequent the lines become."""
    clock = Clock()
    console = Console(3, clock=clock)
    console.begin("step 1: updating the parameters")
    for _ in range(600):
        clock.now += 1.0
        console.tick()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "step 1: updating the parameters",
        "step 1: updating the parameters: 10 s",
        "step 1: updating the parameters: 20 s",
    ]
    assert len(lines) < 20
    console.begin("step 2: updating the parameters")
    clock.now += 10.0
    console.tick()
    assert capsys.readouterr().out.endswith(
        "step 2: updating the parameters: 10 s of about 10 min\n"
    )


def test_more_samples_than_expected_are_not_shown():
    """Processes may have unequal shares of the samples, and a group may be smaller than the maximum size."""
    activity = Activity("step 3", 64, now=0.0)
    activity.advance(sampled(66, 100))
    assert activity.describe(1.0) == "step 3: 64 of 64 samples, 100 tokens/s, 0 s left"
    assert activity.share == 1.0


def test_every_line_fits_into_80_columns():
    activity = Activity("evaluating validation", 99_999, now=0.0)
    for phase in ("prefilling", "sampling", "grading"):
        activity.advance(SamplingProgress(phase, 11_111, 50_000, 50_000))
        assert len(activity.describe(7.0)) <= 80
    activity.set_compiling(True, now=8.0)
    assert len(activity.describe(9.0)) <= 80


def test_the_first_line_is_due_immediately_and_the_others_at_a_sensible_rate():
    pacer, activity = LinePacer(), Activity("evaluating test", 100, now=0.0)
    assert pacer.is_due(activity, 0.0)
    pacer.record_line(0.0, activity)
    activity.advance(sampled(4, 1))
    assert not pacer.is_due(activity, MAX_SECS - 0.1)
    assert pacer.is_due(activity, MAX_SECS)
    activity.advance(sampled(1, 1))
    assert not pacer.is_due(activity, MIN_SECS - 0.1)
    assert pacer.is_due(activity, MIN_SECS)
    pacer.record_line(MIN_SECS, activity)
    assert not pacer.is_due(activity, 2 * MIN_SECS)  # less than 5% of progress since the last line
    assert pacer.is_due(Activity("step 1", 64, now=0.0), 2 * MIN_SECS)


def test_a_long_evaluation_prints_few_lines(capsys):
    """Progress is reported every second for an hour, but lines are printed at most every 30 seconds."""
    clock = Clock()
    console = Console(clock=clock)
    console.begin("evaluating test", 3600)
    for second in range(1, 3601):
        clock.now = float(second)
        console.advance(sampled(1, 50))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluating test: 1 of 3,600 samples, 50 tokens/s"
    assert lines[3] == "evaluating test: 91 of 3,600 samples, 50 tokens/s, 58 min left"
    assert len(lines) <= 3600 / MAX_SECS + 1
    assert all(line.startswith("evaluating test: ") for line in lines)


def test_step_lines_are_printed_for_every_5_percent_or_10_seconds(capsys):
    clock = Clock()
    console = Console(400, clock=clock)
    for step in range(1, 401):
        clock.now += 0.1 if step <= 200 else 20.0
        console.begin(f"step {step}: updating the parameters")
        console.step(step, VALUES | {"budget/progress": step / 400}, secs=0.1)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step") and "updating" not in line]
    assert len(steps) == 10 + 200
    assert steps[0] == (
        "step 20/400  loss -0.052  reward 17/32 (unguided 5/12)  guided 0.21/0.24  length 1,234  38 s left"
    )
    # Every 20-second step prints its own line and at most one line about its activity.
    assert len(lines) - len(steps) <= 201


@pytest.mark.parametrize("num_steps", [1000, 99_999])
def test_the_panel_has_all_metrics_and_the_activity_within_80_columns(
    monkeypatch, capsys, num_steps
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Console(num_steps) as console:
        console.evaluated(5, "validation", EVALUATION)
        console.begin(f"step {num_steps}", 64)
        console.step(num_steps, VALUES | {"budget/progress": 1.0}, secs=1.0)
        console.advance(sampled(12, 100))
        lines = [str(line) for line in list(console._panel.get_renderables())[1:]]
    assert lines[:2] == [
        "loss -0.052  reward 17/32 (unguided 5/12)  guided 0.21/0.24  length 1,234",
        "after step 5: validation accuracy 0.33",
    ]
    assert lines[2].startswith(f"step {num_steps}: 12 of 64 samples")
    assert all(len(line) <= 80 for line in lines)
    output = capsys.readouterr().out
    assert f"{num_steps}/{num_steps}" in output
    assert "left  123,456 tokens/s" in output


def step_line(capsys, **values):
    changes = {name.replace("__", "/"): value for name, value in values.items()}
    Console(2).step(2, VALUES | {"budget/progress": 1.0} | changes, secs=1.0)
    return capsys.readouterr().out.rstrip("\n")


def test_rewards_between_0_and_1_are_shown_as_means(capsys):
    line = step_line(capsys, reward__num_right=16)
    assert "  reward 0.53 (unguided 0.42)  " in line
    assert "  reward 17/32 (unguided 5/12)  " in step_line(capsys)


def test_a_line_of_a_step_has_at_most_100_characters(capsys):
    clock = Clock()
    Console(2000, clock=clock).step(100, VALUES | {"budget/progress": 0.05}, secs=99.0)
    line = capsys.readouterr().out.rstrip("\n")
    assert line.startswith("step 100/2000  loss -0.052  reward 17/32 (unguided 5/12)")
    assert len(line) <= 100


def test_a_step_without_sampled_or_guided_rollouts_has_no_such_numbers(capsys):
    grpo = step_line(capsys, guidance__ratio_mean=0.0, guidance__ratio_max=0.0)
    assert grpo.startswith("step 2/2  loss -0.052  reward 17/32  length 1,234")
    sampled = [name for name in VALUES if name.startswith("reward/")]
    without = {name: value for name, value in VALUES.items() if name not in sampled}
    done = {"budget/progress": 1.0, "completion/len_mean": 0.0, "guidance/ratio_max": 1.0}
    Console(2).step(2, without | done, secs=1.0)
    assert capsys.readouterr().out.startswith("step 2/2  loss -0.052  0 s left")


def test_pass_at_1_does_not_repeat_the_accuracy(capsys):
    Console().evaluated(5, "test", EVALUATION | {"eval/num_samples": 1, "eval/pass@1": 0.333})
    out = capsys.readouterr().out
    assert out.endswith("sampled 0.333 (1 sample each at temperature 0.6)\n")


def test_an_evaluation_of_several_benchmarks_shows_their_mean(capsys):
    mean = {"eval/accuracy_sampled_mean_of_sources": 0.41}
    Console().evaluated(5, "test", EVALUATION | mean)
    assert (
        "sampled 0.333, pass@4 0.500, mean of sources 0.410 (4 samples" in capsys.readouterr().out
    )


@pytest.mark.parametrize("is_terminal", ["0", "1"])
def test_tables_lose_no_text_and_are_not_even_wrapped_without_a_terminal(
    is_terminal, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TTY_COMPATIBLE", is_terminal)
    cells = ["a_rather_long_name_of_a_source", "0.002-0.731", "1234567"]
    Console().table("title", ["", "95% CI", "n"], [cells])
    output = capsys.readouterr().out
    assert "…" not in output
    assert all(cell in output for cell in cells) == (is_terminal == "0")


def test_a_quiet_console_prints_nothing(capsys):
    console = Console(10, quiet=True)
    console.begin("evaluating test", 10)
    console.advance(sampled(1, 1))
    console.step(10, VALUES | {"budget/progress": 1.0}, secs=1.0)
    assert capsys.readouterr().out == ""


def test_a_compilation_is_announced_before_it_ends(capsys):
    """JAX emits the compilation events. Programs that are compiled at the same time count once."""
    changes = []
    console = Console()
    console.begin("evaluating test", 8)

    def on_change(is_compiling):
        changes.append(is_compiling)
        console.set_compiling(is_compiling)

    listener = CompilationListener(on_change)
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)).block_until_ready()
    assert changes
    assert changes == [True, False] * (len(changes) // 2)
    assert capsys.readouterr().out == "evaluating test: compiling, 0 of 8 samples\n"
    changes.clear()
    for change, expected in ((1, [True]), (1, [True]), (-1, [True]), (-1, [True, False])):
        listener._count(COMPILATION, change)
        assert changes == expected
    listener.close()
    jax.jit(lambda x: x * 3 + 2)(jnp.ones(3)).block_until_ready()
    assert changes == [True, False]


def test_durations_have_at_most_three_digits():
    assert [describe_secs(s) for s in (0.4, 119.4, 120, 7199, 7200)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
    ]
