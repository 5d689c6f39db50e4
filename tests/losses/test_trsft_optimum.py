"""Tests Proposition 1 of the TRAPO paper: the policy to which TrSFT converges for a tabular expert."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trapo_jax.losses import trsft_loss_from_logprobs, trsft_optimum


def random_experts(count: int, *, concentration: float) -> np.ndarray:
    rng = np.random.default_rng(int(100 * concentration))
    return rng.dirichlet(np.full(12, concentration), size=count).astype(np.float32)


# 24 experts, from peaked (few classes are pruned) to nearly uniform (many classes are pruned).
EXPERTS = np.concatenate([random_experts(8, concentration=c) for c in (0.3, 1.0, 3.0)])


def expected_loss(probs, expert, alpha):
    return jnp.sum(expert * trsft_loss_from_logprobs(jnp.log(probs), alpha=alpha))


def descend(expert: jax.Array, alpha: float) -> jax.Array:
    """Minimizes the expected TrSFT loss over 12 logits, starting from the expert's log-probabilities.

    Uses Adam, since plain gradient descent is slow: the gradient of a class near the boundary almost vanishes.
    """
    steps = 100_000
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(expert * trsft_loss_from_logprobs(logprobs, alpha=alpha))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (logits + updates, state), None

    start = jnp.log(expert)
    (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return jax.nn.softmax(logits)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_gradient_descent_reaches_the_optimum(alpha):
    optimum, _ = jax.vmap(lambda e: trsft_optimum(e, alpha=alpha))(jnp.asarray(EXPERTS))
    reached = jax.jit(jax.vmap(lambda e: descend(e, alpha)))(jnp.asarray(EXPERTS))
    distance = 0.5 * np.abs(np.asarray(optimum) - np.asarray(reached)).sum(-1)
    pruned = 1 - np.where(np.asarray(optimum) > 0, EXPERTS, 0).sum(-1)
    assert distance.max() < 1e-3, distance
    if alpha == 0.3:
        assert pruned.max() > 0.3, "no expert with a large pruned mass was tried"


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 1.0])
def test_no_policy_near_the_optimum_is_better(alpha):
    rng = np.random.default_rng(0)
    for expert in EXPERTS:
        optimum, _ = trsft_optimum(expert, alpha=alpha)
        best = expected_loss(optimum, expert, alpha)
        for share in (0.01, 0.2):
            others = (1 - share) * optimum + share * rng.dirichlet(np.ones(12), size=20)
            losses = jax.vmap(lambda p, e=expert: expected_loss(p, e, alpha))(others)
            assert (losses >= best - 1e-5).all()


def test_proposition_1_by_hand():
    probs, lambda_ = trsft_optimum(jnp.array([0.6, 0.36, 0.04]), alpha=0.1)
    np.testing.assert_allclose(lambda_, 0.96, rtol=1e-6)
    np.testing.assert_allclose(probs, [0.625, 0.375, 0.0], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_lambda_is_the_kept_mass_where_the_proposition_has_a_solution(alpha):
    solvable = 0
    for expert in EXPERTS:
        probs, lambda_ = trsft_optimum(expert, alpha=alpha)
        sizes = np.sort(expert)[::-1]
        masses = np.cumsum(sizes.astype(np.float64))
        for k, mass in enumerate(masses):
            following = sizes[k + 1] if k + 1 < 12 else 0.0
            if sizes[k] > alpha * mass >= following:  # the fixed point of Proposition 1
                solvable += 1
                kept = expert > alpha * mass
                np.testing.assert_allclose(lambda_, mass, rtol=1e-5)
                np.testing.assert_allclose(probs, np.where(kept, expert / mass, 0), atol=1e-6)
    assert solvable >= 6


def test_a_class_on_the_boundary_gets_the_remaining_probability():
    """Since alpha * 0.72 < 0.28 <= alpha * 1, no kept mass satisfies the proposition."""
    probs, lambda_ = trsft_optimum(jnp.array([0.72, 0.28]), alpha=0.3)
    np.testing.assert_allclose(lambda_, 0.28 / 0.3, rtol=1e-6)
    np.testing.assert_allclose(probs, [0.72 * 0.3 / 0.28, 1 - 0.72 * 0.3 / 0.28], rtol=1e-5)


def test_tied_boundary_classes_share_the_remaining_probability():
    probs, _ = trsft_optimum(jnp.array([0.5, 0.25, 0.25]), alpha=0.4)
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(probs[1], probs[2])


def test_alpha_one_gives_the_mode():
    probs, lambda_ = trsft_optimum(jnp.array([0.2, 0.5, 0.3]), alpha=1.0)
    np.testing.assert_allclose(probs, [0, 1, 0])
    np.testing.assert_allclose(lambda_, 0.5)


def test_small_alpha_keeps_the_expert():
    expert = EXPERTS[-1]
    probs, lambda_ = trsft_optimum(expert, alpha=1e-6)
    np.testing.assert_allclose(lambda_, 1.0, rtol=1e-5)
    np.testing.assert_allclose(probs, expert, rtol=1e-4)


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="alpha"):
        trsft_optimum(jnp.array([1.0]), alpha=0.0)
