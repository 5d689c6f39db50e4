"""Tests the train step against an independent float64 implementation and with different batch layouts."""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from support.commands import run_python
from support.train_step import (
    ALPHA,
    CONFIG,
    MAX_LENGTH,
    NO_TIES,
    build,
    coefficients,
    make_step,
    method_of_every_term,
    one_device_mesh,
    ragged_groups,
    relative_difference,
    sgd_step,
)
from trapo_jax.distributed.sharding import make_mesh
from trapo_jax.losses import linear_token_logprobs
from trapo_jax.methods import TokenInputs, make_method
from trapo_jax.models import apply_decoder, init_params, unembedding
from trapo_jax.training.optimizer import make_learning_rate, make_optimizer
from trapo_jax.training.state import TrainState, init_state, state_shardings, swap_optimizer
from trapo_jax.training.train_step import TokenScorer, make_batch_logprobs
from trapo_jax.types import TokenKind


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init_params(CONFIG, seed=0))


# ---- an independent float64 implementation of the gradient of the objective with respect to the logits ----


def numpy_logit_gradient(logits, batch, *, expert_weight, alpha, length):
    """Computes the gradient token by token: -A rho on completions, TrSFT on expert tokens, constant normalizer."""
    gradient = np.zeros_like(logits, np.float64)
    kinds, ids, advantages = batch.kinds[0], batch.token_ids[0], batch.advantages[0]
    scale = 1.0 / (length * float(batch.num_rollouts))
    for b in range(kinds.shape[0]):
        for t in range(1, kinds.shape[1]):
            z = logits[b, t - 1].astype(np.float64)
            p = np.exp(z - z.max())
            p /= p.sum()
            onehot = np.eye(len(p))[ids[b, t]]
            p_y = p[ids[b, t]]
            if kinds[b, t] == TokenKind.COMPLETION:
                weight = -advantages[b, t]  # d(-A rho) = -A d log p at rho = 1
            elif kinds[b, t] == TokenKind.EXPERT_TRAINED:
                weight = -expert_weight * min(1.0, p_y / alpha)
            else:
                continue
            gradient[b, t - 1] += scale * weight * (onehot - p)
    return gradient


@pytest.mark.slow
def test_trapo_gradient_equals_an_independent_float64_implementation(params):
    groups, advantages = ragged_groups()
    batch = build(groups, advantages)
    method = make_method("trapo", alpha=ALPHA, expert_weight=0.5)
    # Larger weights give sharper distributions, so that some tokens lie inside the trust region and some outside.
    params = jax.tree.map(lambda x: 2.0 * x, params)
    forward = lambda p: (
        apply_decoder(CONFIG, p, batch.token_ids[0], batch.positions[0], batch.segment_ids[0])[0]
        @ unembedding(p)
    )
    logits, pull_back = jax.vjp(forward, params)
    by_logits = numpy_logit_gradient(
        np.asarray(logits), batch, expert_weight=0.5, alpha=ALPHA, length=MAX_LENGTH
    )
    probs = np.asarray(jax.nn.softmax(logits))
    expert = batch.kinds[0][:, 1:] == TokenKind.EXPERT_TRAINED
    p_y = np.take_along_axis(probs[:, :-1], batch.token_ids[0][:, 1:, None], -1)[..., 0][expert]
    assert (p_y < ALPHA).any()
    assert (p_y >= ALPHA).any()
    (expected,) = pull_back(jnp.asarray(by_logits, jnp.float32))
    gradient, _, _ = sgd_step(method, batch, params)
    # `sgd_step` computes the gradient as the difference of old and new parameters, which has float32 rounding errors.
    assert relative_difference(gradient, jax.device_get(expected)) < 3e-6
    # The gradient with respect to the logits does not have this rounding error.
    ours = jax.grad(lambda z: objective_by_logits(z, batch, method))(logits)
    assert np.abs(ours - by_logits).max() / np.abs(by_logits).max() < 1e-6


@pytest.mark.slow
def test_stale_tokens_are_weighted_by_their_ratio_to_the_sampler(params):
    """The advantage of each completion token is effectively multiplied by the ratio. Expert tokens are unaffected."""
    groups, advantages = ragged_groups()
    batch = build(groups, advantages)
    method = make_method("trapo", alpha=ALPHA)
    now = np.asarray(batch_logprobs(batch, params))
    completion = batch.kinds == TokenKind.COMPLETION
    ratio = np.where(completion, np.exp(now - batch.sampler_logprobs), 1.0)
    assert (np.abs(ratio[completion] - 1) > 0.1).any()
    weighted = batch._replace(advantages=batch.advantages * ratio)
    expected, on_policy, _ = sgd_step(method, weighted, params)
    gradient, metrics, _ = sgd_step(method, batch, params, ratio_to="sampler")
    assert relative_difference(gradient, expected) < 1e-5
    np.testing.assert_allclose(metrics["policy/ratio_mean"], ratio[completion].mean(), rtol=1e-5)
    gap = np.abs(now - batch.sampler_logprobs)[completion]
    # In both cases, the gap is between the trainer and the sampler.
    for step_metrics in (metrics, on_policy):
        np.testing.assert_allclose(step_metrics["policy/logprob_gap_mean"], gap.mean(), rtol=1e-5)


def objective_by_logits(logits, batch, method):
    """Computes the objective from logits with the library's losses and weights."""
    from trapo_jax.losses import token_logprobs
    from trapo_jax.training.train_step import term_weights

    weights = term_weights(batch, method.terms, MAX_LENGTH)
    logprobs = token_logprobs(logits[:, :-1], batch.token_ids[0][:, 1:])
    total = 0.0
    for term in method.terms:
        mask = np.isin(batch.kinds[0][:, 1:], term.kinds)
        old = jax.lax.stop_gradient(logprobs)
        values = term.loss(
            TokenInputs(
                logprobs, old, None, batch.advantages[0][:, 1:], mask, old, batch.segment_ids[0], 1
            )
        )
        total += term.weight * jnp.sum(values * weights[term.name][0])
    return total


@pytest.mark.slow
def test_gradient_does_not_depend_on_the_layout(params):
    """64 rollouts give the same gradient and metrics in micro-batches of any size, packed or not, and with shared prompts."""
    groups, advantages = ragged_groups(NO_TIES, num_problems=8)
    method = method_of_every_term()
    assert len({term.name for term in method.terms}) == len(method.terms) == 18
    whole = sgd_step(method, build(groups, advantages), params)
    layouts = [
        {"micro_batch_rows": 1},
        {"micro_batch_rows": 2},
        {"micro_batch_rows": 4},
        {"micro_batch_rows": 8},
        {"packed": True, "row_len": 33, "micro_batch_rows": 2},
        {"packed": True, "row_len": 33, "micro_batch_rows": 7},
        {"packed": True, "share_prompts": True, "row_len": 33, "micro_batch_rows": 2},
        {"packed": True, "share_prompts": True, "row_len": 100, "micro_batch_rows": 3},
    ]
    for layout in layouts:
        other = sgd_step(method, build(groups, advantages, **layout), params)
        assert relative_difference(other[0], whole[0]) < 1e-5, layout
        for name, value in whole[1].items():
            np.testing.assert_allclose(other[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("local_layers", [(True, True), (True, False)])
def test_the_window_counts_positions_if_prompts_are_shared(params, local_layers):
    """Two tokens of a rollout are farther apart in a row than in the rollout if other rollouts lie between them."""
    decoder = dataclasses.replace(CONFIG, window=3, local_layers=local_layers)
    groups, advantages = ragged_groups()
    layout = {"packed": True, "row_len": 60, "micro_batch_rows": 8 * len(groups)}
    logprobs_of = {}
    for share in (False, True):
        batch = build(groups, advantages, **layout, share_prompts=share)
        logprobs = np.asarray(batch_logprobs(batch, params, decoder))
        is_trained = (batch.kinds > TokenKind.PROMPT) & (logprobs != 0)
        order = np.lexsort((batch.positions[is_trained], batch.segment_ids[is_trained]))
        logprobs_of[share] = logprobs[is_trained][order]
    np.testing.assert_allclose(logprobs_of[True], logprobs_of[False], atol=1e-5)


@pytest.mark.slow
def test_padding_and_pad_id_do_not_matter(params):
    groups, advantages = ragged_groups()
    method = make_method("trapo")
    reference = sgd_step(method, build(groups, advantages), params)[0]
    for options in ({"row_len": 64}, {"pad_id": 5}, {"micro_batch_rows": 35}):
        other = sgd_step(method, build(groups, advantages, **options), params)[0]
        assert relative_difference(other, reference) < 1e-5, options


@pytest.mark.slow
def test_other_lengths_do_not_recompile(params):
    """Rollouts of other lengths fill a different number of rows, but the same compiled program processes them."""
    optimizer = optax.sgd(0.01)
    mesh = one_device_mesh()
    method = make_method("trapo")
    step = make_step(method, params, mesh, optimizer)
    state = init_state(params, optimizer, mesh)
    numbers = set()
    for seed in range(8):
        groups, advantages = ragged_groups(seed)
        batch = build(groups, advantages, packed=True, micro_batch_rows=3)
        numbers.add(int(batch.num_micro_batches))
        rate = {"learning_rate": np.float32(seed)}
        state, _, _ = step(state, batch, {**coefficients(method), **rate})
    assert len(numbers) > 1
    assert step._cache_size() == 1


@pytest.mark.slow
def test_the_gradient_of_a_batch_is_the_sum_over_its_groups(params):
    groups, advantages = ragged_groups()
    method = make_method("trapo", normalizer="constant_sum")
    alone = [
        sgd_step(method, build([g], [a]), params)[0]
        for g, a in zip(groups, advantages, strict=True)
    ]
    together = sgd_step(method, build(groups, advantages), params)[0]
    assert relative_difference(jax.tree.map(lambda *x: sum(x), *alone), together) < 1e-5


@pytest.mark.slow
def test_sft_is_the_mean_cross_entropy(params):
    groups, advantages = ragged_groups()
    batch = build(groups, advantages)
    _, metrics, _ = sgd_step(make_method("sft"), batch, params)
    hidden, _ = apply_decoder(
        CONFIG, params, batch.token_ids[0], batch.positions[0], batch.segment_ids[0]
    )
    logprobs = linear_token_logprobs(
        hidden[:, :-1], unembedding(params), batch.token_ids[0][:, 1:], chunk_size=64
    )
    expert = batch.kinds[0][:, 1:] == TokenKind.EXPERT_TRAINED
    np.testing.assert_allclose(
        metrics["loss/cross_entropy"], -np.asarray(logprobs)[expert].mean(), rtol=1e-5
    )


@pytest.mark.slow
def test_grpo_ignores_the_expert(params):
    groups, advantages = ragged_groups()
    gradient = sgd_step(make_method("grpo"), build(groups, advantages), params)[0]
    without = sgd_step(make_method("trapo", expert_weight=0.0), build(groups, advantages), params)[
        0
    ]
    assert relative_difference(gradient, without) < 1e-6


@pytest.mark.slow
def test_entropy_bonus_raises_entropy(params):
    groups, advantages = ragged_groups()
    batch = build(groups, [np.zeros_like(a) for a in advantages])
    method = make_method("grpo", entropy_weight=1.0)
    before = sgd_step(method, batch, params)[1]["policy/entropy"]
    _, _, state = sgd_step(method, batch, params, optimizer=optax.sgd(0.1))
    after = sgd_step(method, batch, jax.device_get(state.params))[1]["policy/entropy"]
    assert after > before


@pytest.mark.slow
def test_metrics_by_hand(params):
    groups, advantages = ragged_groups()
    batch = build(groups, advantages)
    _, metrics, _ = sgd_step(make_method("trapo"), batch, params)
    hidden, _ = apply_decoder(
        CONFIG, params, batch.token_ids[0], batch.positions[0], batch.segment_ids[0]
    )
    logprobs = np.asarray(
        linear_token_logprobs(
            hidden[:, :-1], unembedding(params), batch.token_ids[0][:, 1:], chunk_size=64
        )
    )
    kinds = batch.kinds[0][:, 1:]
    completion, expert = kinds == TokenKind.COMPLETION, kinds == TokenKind.EXPERT_TRAINED
    gap = np.abs(logprobs - batch.sampler_logprobs[0][:, 1:])[completion]
    np.testing.assert_allclose(metrics["policy/logprob_gap_max"], gap.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/logprob_gap_mean"], gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["expert/prob_mean"], np.exp(logprobs[expert]).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["expert/share_below_alpha"], (np.exp(logprobs[expert]) < ALPHA).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["loss/total"], metrics["loss/trsft"] + metrics["loss/policy_gradient"], rtol=1e-5
    )
    probs = np.exp(logprobs[expert])
    logit_grad = np.minimum(1, probs / ALPHA) * (1 - probs)
    inside = logit_grad[probs >= ALPHA].sum() / logit_grad.sum()
    np.testing.assert_allclose(metrics["expert/gradient_share_inside"], inside, rtol=1e-4)
    histogram = np.histogram(probs, bins=10, range=(0, 1))[0] / probs.size
    logged = [metrics[f"expert/prob_from_{i / 10:.1f}"] for i in range(10)]
    np.testing.assert_allclose(logged, histogram, rtol=1e-5)
    assert np.count_nonzero(histogram) > 1


@pytest.mark.slow
def test_the_trace_contains_the_logprob_and_gradient_weight_of_each_trained_token(params):
    """The trace covers every position of a row.

    Gradient weights include all loss terms. Here, the expert weight is 2, and ratios are not clipped.
    """
    groups, advantages = ragged_groups()
    batch = build(groups, advantages, packed=True, row_len=33, micro_batch_rows=3)
    mesh, optimizer = one_device_mesh(), optax.sgd(1.0)
    method = make_method("trapo", expert_weight=2.0)
    step = make_step(method, params, mesh, optimizer)
    _, _, trace = step(init_state(params, optimizer, mesh), batch, coefficients(method))
    logprobs = np.asarray(batch_logprobs(batch, params))
    np.testing.assert_allclose(trace.logprobs, logprobs, rtol=1e-5)
    expected = np.where(batch.kinds == TokenKind.COMPLETION, np.abs(batch.advantages), 0.0)
    expert = batch.kinds == TokenKind.EXPERT_TRAINED
    expected[expert] = 2 * np.minimum(1, np.exp(logprobs[expert]) / ALPHA)
    expected /= MAX_LENGTH * batch.num_rollouts
    np.testing.assert_allclose(trace.gradient_weights, expected, rtol=1e-4)
    assert np.count_nonzero(expected) > expert.sum() > 0


def batch_logprobs(batch, params, decoder=CONFIG):
    mesh = one_device_mesh()
    shardings = state_shardings(params, optax.sgd(1.0), mesh).params
    build = make_batch_logprobs(TokenScorer(decoder, 1.0, 7), mesh, shardings)
    return build(jax.device_put(params, shardings), batch)


def other_policy(params, size=0.3):
    """Returns parameters that are close to `params` but define a different policy."""
    noise = lambda x: size * np.random.default_rng(x.size).normal(size=x.shape) * np.std(x)
    return jax.tree.map(lambda x: np.float32(x + noise(x)), params)


@pytest.mark.slow
def test_clipped_update_and_divergence_equal_an_independent_float64_implementation(params):
    """Checks a second update on a batch, with ratios outside both bounds and a third policy as the reference."""
    groups, advantages = ragged_groups()
    batch = build(groups, advantages)
    old, ref = (np.asarray(batch_logprobs(batch, other_policy(params, x))) for x in (0.3, 0.1))
    method = make_method("grpo", clip_low=0.1, clip_high=0.2, kl_weight=0.5)
    gradient, metrics, _ = sgd_step(
        method, batch._replace(old_logprobs=old, ref_logprobs=ref), params
    )
    forward = lambda p: (
        apply_decoder(CONFIG, p, batch.token_ids[0], batch.positions[0], batch.segment_ids[0])[0]
        @ unembedding(p)
    )
    logits, pull_back = jax.vjp(forward, params)
    by_logits = np.zeros(logits.shape)
    clipped = {-1: 0, 1: 0}
    kl, ratios = 0.0, []
    for b, t in zip(*np.nonzero(batch.kinds[0] == TokenKind.COMPLETION), strict=True):
        z = np.asarray(logits[b, t - 1], np.float64)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        y, advantage = batch.token_ids[0, b, t], float(batch.advantages[0, b, t])
        ratio = p[y] / np.exp(np.float64(old[0, b, t]))
        ratios.append(ratio)
        slope = -advantage * ratio
        if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.9):
            clipped[int(np.sign(advantage))] += 1
            slope = 0.0
        from_ref = np.exp(np.float64(ref[0, b, t])) / p[y]
        kl += from_ref - np.log(from_ref) - 1
        slope += 0.5 * (1 - from_ref)
        by_logits[b, t - 1] += slope * (np.eye(len(p))[y] - p)
    scale = 1 / (MAX_LENGTH * float(batch.num_rollouts))
    assert min(clipped.values()) > 0
    (expected,) = pull_back(jnp.asarray(scale * by_logits, jnp.float32))
    assert relative_difference(gradient, jax.device_get(expected)) < 1e-5
    np.testing.assert_allclose(metrics["loss/kl"], 0.5 * scale * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/ratio_mean"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/ratio_max"], max(ratios), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["policy/clipped_share"], sum(clipped.values()) / len(ratios), rtol=1e-5
    )


@pytest.mark.slow
def test_old_logprobs_of_the_same_policy_do_not_change_the_gradient(params):
    """A single update per batch therefore needs no forward pass for old log-probabilities."""
    groups, advantages = ragged_groups()
    batch = build(groups, advantages, packed=True, row_len=33, micro_batch_rows=7)
    method = make_method("trapo", clip_low=0.2, clip_high=0.2)
    with_old = batch._replace(old_logprobs=batch_logprobs(batch, params))
    without, metrics, _ = sgd_step(method, batch, params)
    gradient, same_metrics, _ = sgd_step(method, with_old, params)
    assert relative_difference(gradient, without) < 1e-5
    for name, value in metrics.items():
        np.testing.assert_allclose(same_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert metrics["policy/ratio_max"] == 1
    assert metrics["policy/clipped_share"] == 0


@pytest.mark.slow
def test_one_update_compiles_to_one_forward_and_one_backward_pass(params):
    """An update takes about three times the FLOPs of a forward pass, and none for old log-probabilities."""
    groups, advantages = ragged_groups()
    batch = build(groups, advantages, micro_batch_rows=8)
    method, mesh, optimizer = make_method("trapo"), one_device_mesh(), optax.sgd(1.0)
    shardings = state_shardings(params, optimizer, mesh)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, mesh), params)
    flops = lambda program: program.compile().cost_analysis()["flops"]
    forward = make_batch_logprobs(TokenScorer(CONFIG, 1.0, 7), mesh, shardings.params).lower(
        state.params, batch
    )
    step = make_step(method, params, mesh, optimizer)
    ratio = flops(step.lower(state, batch, coefficients(method))) / flops(forward)
    assert 2 < ratio < 3.5


@pytest.mark.slow
def test_an_update_with_a_non_finite_or_too_large_gradient_is_skipped_and_counted(params):
    groups, advantages = ragged_groups()
    method = dataclasses.replace(make_method("trapo"), max_applied_grad_norm=10.0)
    optimizer, mesh = optax.adam(1e-3), one_device_mesh()
    step = make_step(method, params, mesh, optimizer)
    state = init_state(params, optimizer, mesh)
    for number, bad_value in enumerate((np.nan, 1e5), start=1):
        bad = [a.copy() for a in advantages]
        bad[0][0] = bad_value
        state, metrics, _ = step(state, build(groups, bad), coefficients(method))
        assert metrics["optimizer/skipped"] == 1
        assert np.isfinite(metrics["optimizer/grad_norm"]) == (number == 2)
        assert (state.step, state.num_skipped_in_a_row) == (number, number)
        for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(new, old)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.opt_state)))
    state, metrics, _ = step(state, build(groups, advantages), coefficients(method))
    assert (metrics["optimizer/skipped"], state.num_skipped_in_a_row) == (0, 0)


def test_swapping_optimizer_states_twice_restores_them():
    state = TrainState("params", "main", 7, 0, ("second", "third"))
    swapped = swap_optimizer(state, 2)
    assert (swapped.opt_state, swapped.other_opt_states) == ("third", ("second", "main"))
    assert swap_optimizer(swapped, 2) == swap_optimizer(state, 0) == state


@pytest.mark.slow
def test_nan_at_masked_tokens_changes_nothing(params):
    """Advantages and log-probabilities at tokens without an RL loss do not matter."""
    groups, advantages = ragged_groups()
    batch = build(groups, advantages, packed=True, row_len=33, micro_batch_rows=7)
    completion = batch.kinds == TokenKind.COMPLETION
    with_nans = batch._replace(
        advantages=np.where(completion, batch.advantages, np.nan),
        sampler_logprobs=np.where(completion, batch.sampler_logprobs, np.nan),
    )
    method = make_method("trapo")
    gradient, metrics, _ = sgd_step(method, batch, params)
    same_gradient, same_metrics, _ = sgd_step(method, with_nans, params)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics == same_metrics


def test_learning_rate_warms_up_and_decays():
    rate = make_learning_rate(
        learning_rate=2.0, warmup_steps=2, decay_start=0.5, final_learning_rate_ratio=0.1
    )
    rates = [rate(step, (step - 1) / 10) for step in range(1, 11)]
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.64, 1.28, 0.92, 0.56]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rate(11, 1.0) == pytest.approx(0.2)
    assert rate(0.5, 0.0) == 0.5  # after the first of two updates in the first step
    # If a budget ends the run after five steps, warm-up is unchanged, and the decay is twice as fast.
    rates = [rate(step, (step - 1) / 5) for step in range(1, 6)]
    np.testing.assert_allclose(rates, [1.0, 2.0, 2.0, 1.64, 0.92], rtol=1e-6)


def test_learning_rate_without_warmup_and_decay_is_constant():
    rate = make_learning_rate(
        learning_rate=0.3, warmup_steps=0, decay_start=1.0, final_learning_rate_ratio=0.1
    )
    assert {rate(step, (step - 1) / 4) for step in range(1, 5)} == {0.3}


def test_learning_rate_scales_the_update(params):
    groups, advantages = ragged_groups()
    batch, method, mesh = build(groups, advantages), make_method("trapo"), one_device_mesh()
    optimizer = optax.sgd(1.0)
    whole = sgd_step(method, batch, params)[0]
    step = make_step(method, params, mesh, optimizer)
    numbers = {**coefficients(method), "learning_rate": np.float32(0.25)}
    state, _, _ = step(init_state(params, optimizer, mesh), batch, numbers)
    quarter = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params)
    assert relative_difference(jax.tree.map(lambda x: 4 * x, quarter), whole) < 1e-5


def test_gradient_is_clipped_to_its_maximum_norm(params):
    groups, advantages = ragged_groups()
    batch, method, mesh = build(groups, advantages), make_method("trapo"), one_device_mesh()
    optimizer = optax.sgd(1.0)
    whole, metrics, _ = sgd_step(method, batch, params)
    step = make_step(method, params, mesh, optimizer)
    for share in (0.25, 4.0):
        bound = np.float32(share * metrics["optimizer/grad_norm"])
        numbers = {**coefficients(method), "max_grad_norm": bound}
        state, clipped, _ = step(init_state(params, optimizer, mesh), batch, numbers)
        assert clipped["optimizer/grad_norm"] == metrics["optimizer/grad_norm"]  # before clipping
        applied = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params)
        expected = jax.tree.map(lambda x: min(1.0, share) * x, whole)  # noqa: B023
        assert relative_difference(applied, expected) < 1e-5


@pytest.mark.slow
def test_weight_decay_does_not_apply_to_norms(params):
    decaying = make_optimizer(adam_b1=0.9, adam_b2=0.9, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decaying.update(zeros, decaying.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.1 * params["embedding"], rtol=1e-5)
    np.testing.assert_array_equal(updates["layers"]["mlp_norm"], 0.0)
    np.testing.assert_array_equal(updates["final_norm"], 0.0)


@pytest.mark.slow
def test_same_gradient_on_eight_devices():
    """A separate process checks meshes of 2, 8, 4 x 2, and 2 x 2 x 2 simulated host devices."""
    script = Path(__file__).with_name("eight_devices.py")
    result = run_python(script, PYTHONPATH=os.pathsep.join(sys.path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 meshes agree" in result.stdout


def test_the_error_for_a_mesh_that_does_not_fit_names_its_axes():
    from trapo_jax.types import UserError

    with pytest.raises(UserError, match=r"mesh.fsdp=1 x mesh.tp=3: the number of devices"):
        make_mesh(fsdp=1, tp=3)
