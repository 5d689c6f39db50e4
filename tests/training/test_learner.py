"""Tests the learner: stages with separate optimizer states and schedules, mini-batches, and the expert loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.train_step import CONFIG, one_device_mesh, ragged_groups
from trapo_jax.config import Config, load_config
from trapo_jax.methods import Stage, Update, make_method
from trapo_jax.methods.selection import expert_row, rows_of_group
from trapo_jax.models import apply_decoder, init_params, unembedding
from trapo_jax.training.learner import Learner, merge_mini_batches, split_rows
from trapo_jax.training.state import init_state
from trapo_jax.types import Moment, StagePosition


@pytest.fixture(scope="module")
def config():
    return load_config(
        Config,
        None,
        [
            ("data.max_prompt_length", "6"),
            ("sampling.max_completion_length", "12"),
            ("train.problems_per_step", "4"),
            ("train.warmup_steps", "2"),
            ("train.learning_rate", "0.01"),
        ],
    )


@pytest.fixture(scope="module")
def learner(config):
    stages = (Stage("sft", share=0.5, learning_rate=0.1, warmup_steps=0), Stage("rl"))
    method = dataclasses.replace(make_method("trapo"), stages=stages)
    return Learner(config, method, CONFIG, one_device_mesh())


def restart(learner, params):
    params = jax.tree.map(jnp.array, params)  # copies, since the state is donated
    learner.state = init_state(params, learner.optimizer, learner.mesh)


def random_update(seed):
    groups, advantages = ragged_groups(seed)
    rows = [
        row
        for group, values in zip(groups, advantages, strict=True)
        for row in rows_of_group(group, values, [r.request.prefix_len > 0 for r in group])
    ]
    return Update(rows)


def at(index, step, progress=0.0):
    return Moment(10 + step, 0.5, 0, StagePosition(index, step, progress))


@pytest.mark.slow
def test_a_stage_begins_like_a_new_run(learner):
    """The first steps of a stage equal the first steps of a new learner with the same parameters."""
    params = init_params(CONFIG, seed=0)
    restart(learner, params)
    for step in (1, 2):
        learner.update([random_update(step)], at(0, step))
    between = jax.device_get(learner.params)
    runs = {}
    for name, moments in {"staged": [at(1, 1), at(1, 2)], "new": [at(1, 1), at(1, 2)]}.items():
        if name == "new":
            restart(learner, between)
        learned = [learner.update([random_update(7)], moment) for moment in moments]
        assert [x.metrics["optimizer/learning_rate"] for x in learned] == [0.005, 0.01]
        runs[name] = jax.device_get((learner.params, learner.state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, runs["staged"], runs["new"])


@pytest.mark.slow
@pytest.mark.parametrize("has_ratio", [False, True])
def test_mini_batches_are_separate_steps_with_a_common_old_policy(config, has_ratio):
    """The result equals that of two updates with half of the rows each.

    The exception is that both updates compute ratios relative to the policy before the first update.
    """
    method = make_method("trapo")
    if not has_ratio:
        method = dataclasses.replace(method, terms=method.terms[1:])
    train = config.train.model_copy(update={"num_mini_batches": 2})
    split = Learner(config.model_copy(update={"train": train}), method, CONFIG, one_device_mesh())
    whole = Learner(config, method, CONFIG, one_device_mesh())
    params, update = init_params(CONFIG, seed=0), random_update(1)
    for learner in (split, whole):
        restart(learner, params)
    learned = split.update([update], at(0, 5))
    for i in range(2):
        whole.update([Update(update.rows[i::2])], at(0, 5))
    assert len(learned.traces) == 2
    assert learned.usage.tokens_trained == sum(row.num_trained for row in update.rows)
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), split.params, whole.params)
    assert (max(jax.tree.leaves(gaps)) < 1e-5) == (not has_ratio)


def test_rows_are_dealt_to_mini_batches_in_turn():
    assert split_rows(list("abcdefg"), 3) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert split_rows(list("ab"), 3) == [["a"], ["b"]]
    assert split_rows([], 3) == [[]]


def test_metrics_of_mini_batches_are_averaged_and_token_counts_are_summed():
    metrics = [
        {"loss/total": 1.0, "batch/pad_tokens": 4},
        {"loss/total": 2.0, "batch/pad_tokens": 6},
    ]
    assert merge_mini_batches(metrics) == {"loss/total": 1.5, "batch/pad_tokens": 10}


@pytest.mark.slow
def test_a_stage_keeps_its_optimizer_moments_between_steps(learner):
    params = init_params(CONFIG, seed=0)
    restart(learner, params)
    learner.update([random_update(1)], at(1, 1))
    learner.update([random_update(2)], at(1, 2))
    assert learner.state.opt_state[0].count == 2


def test_a_stage_has_its_own_learning_rate(learner):
    restart(learner, init_params(CONFIG, seed=0))
    rates = [
        learner.update([random_update(1)], at(index, step)).metrics["optimizer/learning_rate"]
        for index, step in ((0, 1), (0, 2), (1, 1), (1, 5))
    ]
    assert rates == [0.1, 0.1, 0.005, 0.01]


@pytest.mark.slow
def test_expert_loss_is_the_mean_over_tokens(learner):
    params = init_params(CONFIG, seed=0)
    restart(learner, params)
    problems = [group[0].request.problem for group in ragged_groups(3, num_problems=40)[0]]
    total, count = 0.0, 0
    for problem in problems:
        completion = expert_row(problem, 12).completion
        ids = np.array([*completion.request.problem.prompt_ids, *problem.experts[0].token_ids])
        positions = np.arange(len(ids))[None]
        hidden, _ = apply_decoder(CONFIG, params, ids[None], positions, np.ones_like(positions))
        logprobs = jax.nn.log_softmax(hidden[0] @ unembedding(params))
        for t in range(len(problem.prompt_ids), len(ids)):
            total, count = total - float(logprobs[t - 1, ids[t]]), count + 1
    assert learner.max_rows < len(problems)  # requires several batches
    assert learner.expert_loss(problems) == pytest.approx(total / count, rel=1e-5)
    without = [dataclasses.replace(p, experts=()) for p in problems[:3]]
    assert learner.expert_loss([*without, *problems]) == pytest.approx(total / count, rel=1e-5)
