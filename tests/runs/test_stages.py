"""Tests when the stages of a run begin and end."""

import json

import pytest

from trapo_jax.methods import Stage
from trapo_jax.runs.stages import StageTracker
from trapo_jax.types import StagePosition


def follow(stages: list[Stage], progress: list[float]) -> list[StagePosition]:
    """Returns the stage position of each step, given the run's progress before that step."""
    tracker, positions = StageTracker(stages), []
    for step, before in enumerate(progress, start=1):
        tracker.advance(step - 1, before)
        positions.append(tracker.position(step, before))
    return positions


def test_a_single_stage_spans_the_whole_run():
    positions = follow([Stage("main")], [0.0, 0.25, 0.6])
    assert positions == [StagePosition(0, step, p) for step, p in ((1, 0.0), (2, 0.25), (3, 0.6))]


def test_stage_ends_at_its_share_of_the_budget():
    positions = follow([Stage("sft", share=0.4), Stage("rl")], [0.0, 0.2, 0.4, 0.7])
    assert [(p.index, p.step) for p in positions] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [p.progress for p in positions] == pytest.approx([0.0, 0.5, 0.0, 0.5])


def test_stage_that_overshoots_leaves_the_rest_to_the_next_stage():
    # Steps are not split: the second stage begins at progress 0.6, so progress 0.8 is halfway through that stage.
    positions = follow([Stage("sft", share=0.4), Stage("rl")], [0.0, 0.6, 0.8])
    assert [p.progress for p in positions] == pytest.approx([0.0, 0.0, 0.5])
    assert [p.index for p in positions] == [0, 1, 1]


def test_stage_ends_after_its_number_of_steps():
    positions = follow([Stage("sft", num_steps=2), Stage("rl")], [0.0, 0.1, 0.2, 0.6])
    assert [(p.index, p.step) for p in positions] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [p.progress for p in positions] == pytest.approx([0.0, 0.5, 0.0, 0.5])


def test_stage_without_a_share_is_skipped():
    positions = follow([Stage("sft", share=0.0), Stage("rl")], [0.0, 0.5])
    assert positions == [StagePosition(1, 1, 0.0), StagePosition(1, 2, 0.5)]


def test_stage_ends_when_the_validation_loss_stops_falling():
    tracker = StageTracker([Stage("sft", patience=2), Stage("rl", patience=2)])
    for number, (loss, ends) in enumerate(
        [(2.0, False), (1.0, False), (1.5, False), (0.9, False), (0.9, False), (1.0, True)], 1
    ):
        tracker.observe(loss)
        assert tracker.advance(number, number / 10) == ends
    for number in (7, 8, 9):  # The last stage ends only with the run.
        tracker.observe(5.0)
        assert not tracker.advance(number, number / 10)
    assert tracker.position(10, 0.9).index == 1


def test_state_survives_a_checkpoint():
    stages = [Stage("sft", share=0.4, patience=3), Stage("rl")]
    tracker, restored = StageTracker(stages), StageTracker(stages)
    tracker.observe(2.0)
    tracker.observe(3.0)
    for step, progress in ((1, 0.2), (2, 0.5), (3, 0.9)):
        restored.state = json.loads(json.dumps(tracker.state))
        assert restored.position(step, progress) == tracker.position(step, progress)
        assert restored.advance(step, progress) == tracker.advance(step, progress)
