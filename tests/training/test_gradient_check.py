"""Tests that the gradient check detects bugs that occur in published baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.check_step import check_run
from trapo_jax.config import Config, load_config
from trapo_jax.training import train_step
from trapo_jax.training.gradient_check import (
    BrokenTrainStep,
    compare_gradients,
    pick_test_problems,
)
from trapo_jax.training.learner import Learner
from trapo_jax.types import Expert, Problem, UserError

fori_loop = jax.lax.fori_loop


def short(method):
    return load_config(Config, None, [("method.name", method), ("data.num_train", "8")])


@pytest.mark.slow
def test_a_method_with_all_kinds_of_tokens_passes():
    assert 0 < check_run(short("trapo")) < 1e-5


@pytest.mark.slow
def test_dropped_gradients_of_micro_batches_are_detected(monkeypatch):
    """Only the gradient of the last micro-batch is applied, as in published baselines."""

    def only_last(lower, upper, body, initial):
        if body.__name__ != "add_micro_batch":
            return fori_loop(lower, upper, body, initial)
        return body(upper - 1, initial)

    monkeypatch.setattr(jax.lax, "fori_loop", only_last)
    with pytest.raises(BrokenTrainStep, match="sft: the gradient of a batch changes by"):
        check_run(short("sft"))


@pytest.mark.slow
def test_a_mean_of_micro_batch_means_is_detected(monkeypatch):
    """Every micro-batch has the same weight regardless of its number of tokens, as in published baselines."""

    def equal_shares(tree, index):
        one = micro_batch(tree, index)
        if not isinstance(tree[1], dict):
            return one
        batch, weights = one
        return batch, {
            k: w / jnp.maximum(w.sum(), 1e-9) / len(tree[0].kinds) for k, w in weights.items()
        }

    micro_batch = train_step._micro_batch
    monkeypatch.setattr(train_step, "_micro_batch", equal_shares)
    with pytest.raises(BrokenTrainStep, match="sft: the gradient of a batch changes by"):
        check_run(short("sft"))


@pytest.mark.slow
def test_a_stage_that_inherits_optimizer_moments_from_another_is_detected(monkeypatch):
    assert 0 < check_run(short("sft_then_grpo")) < 1e-5
    reset, inside = Learner.reset_optimizer, []
    monkeypatch.setattr(
        Learner, "reset_optimizer", lambda learner: None if inside else reset(learner)
    )
    update = Learner.update

    def update_without_reset(learner, updates, moment):
        inside.append(True)
        learned = update(learner, updates, moment)
        inside.pop()
        return learned

    monkeypatch.setattr(Learner, "update", update_without_reset)
    with pytest.raises(
        BrokenTrainStep, match="stage rl begins with the previous stage's optimizer state"
    ):
        check_run(short("sft_then_grpo"))


def test_the_difference_is_relative_to_the_norm_of_the_gradient():
    whole = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    close = {"a": np.array([3.0, 3e-4]), "b": np.array([[4.0 + 4e-4]])}
    assert compare_gradients(whole, close, "m") == pytest.approx(1e-4)
    half = jax.tree.map(lambda x: x / 2, whole)
    with pytest.raises(
        BrokenTrainStep, match=r"m: the gradient of a batch changes by 0\.5 of its norm"
    ):
        compare_gradients(whole, half, "m")


def test_a_gradient_that_is_zero_or_not_finite_is_rejected():
    for value in (0.0, np.nan, np.inf):
        gradient = {"a": np.array([value])}
        with pytest.raises(BrokenTrainStep, match="the gradient of the checked batch has norm"):
            compare_gradients(gradient, gradient, "m")


def test_problems_with_short_solutions_of_different_lengths_are_picked():
    lens = {"a": 5, "b": 3, "c": 3, "d": 4, "e": 40}
    problems = [Problem(name, (1,), "", (Expert((2,) * n),)) for name, n in lens.items()]
    problems.append(Problem("f", (1,), "", ()))
    assert [p.id for p in pick_test_problems(problems, 10)] == ["b", "d"]
    with pytest.raises(UserError, match="needs two training problems with an expert solution"):
        pick_test_problems(problems[4:], 10)
