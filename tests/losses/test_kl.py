"""Tests the estimators of KL(policy || reference)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trapo_jax.losses import kl_penalty

# The value and its derivative with respect to log p, as functions of d = log p - log p_ref.
FORMULAE = {
    "k1": (lambda d: d, lambda d: np.ones_like(d)),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
}


@pytest.fixture(params=FORMULAE)
def estimator(request):
    return request.param


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [np.exp(-0.5) - 0.5, np.e - 2])],
)
def test_values_by_hand(estimator, expected):
    """The expected values are for d = 0.5 and d = -1."""
    logprobs, ref_logprobs = jnp.array([-1.0, -3.0]), jnp.array([-1.5, -2.0])
    got = kl_penalty(logprobs, ref_logprobs, estimator=estimator)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_finite_inputs_give_a_finite_value_and_gradient(estimator):
    """Without a limit, k3 would overflow for d = -100. Its gradient never lowers a probability that should rise."""
    difference = jnp.array([-1e4, -100.0, -20.5, 0.0, 100.0, 1e4])
    total = lambda d: kl_penalty(d - 1e4, -1e4 * jnp.ones(6), estimator=estimator).sum()
    value, gradient = jax.value_and_grad(total)(difference)
    assert np.isfinite(value)
    assert np.isfinite(np.linalg.norm(gradient))
    if estimator != "k1":
        assert (np.sign(gradient) * np.sign(difference) >= 0).all()


def test_k3_is_the_default():
    logprobs, ref_logprobs = jnp.array([-1.0, -3.0]), jnp.array([-1.5, -2.0])
    np.testing.assert_array_equal(
        kl_penalty(logprobs, ref_logprobs), kl_penalty(logprobs, ref_logprobs, estimator="k3")
    )


def test_gradient_with_respect_to_logits_equals_the_formula(estimator):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 50)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    logprobs = np.log(probs[np.arange(50), labels])
    ref_logprobs = (logprobs + rng.normal(size=50)).astype(np.float32)

    def total(logits):
        picked = jax.nn.log_softmax(logits)[jnp.arange(50), labels]
        return kl_penalty(picked, ref_logprobs, estimator=estimator).sum()

    _, slope = FORMULAE[estimator]
    by_logprob = slope(logprobs - ref_logprobs.astype(np.float64))
    expected = by_logprob[:, None] * (np.eye(8)[labels] - probs)
    np.testing.assert_allclose(
        jax.grad(total)(jnp.asarray(logits)),
        expected,
        rtol=1e-6,
        atol=1e-6 * np.abs(expected).max(),
    )


def test_check_grads(estimator):
    logprobs = jnp.array([-0.2, -1.0, -4.0])
    check_grads(
        lambda x, y: kl_penalty(x, y, estimator=estimator), (logprobs, logprobs[::-1]), order=2
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_over_the_policy_equals_the_kl_divergence(estimator):
    """k1 and k3 are unbiased: their sum over the vocabulary, weighted by the policy, is the exact KL divergence."""
    rng = np.random.default_rng(1)
    policy, reference = rng.dirichlet(np.ones(12), size=2)
    penalties = kl_penalty(np.log(policy), np.log(reference), estimator=estimator)
    np.testing.assert_allclose(
        np.sum(policy * penalties), np.sum(policy * np.log(policy / reference)), rtol=1e-5
    )


def test_expected_gradient_of_k2_equals_that_of_the_kl_divergence():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=6), jnp.float32)
    reference = jnp.log(jnp.asarray(rng.dirichlet(np.ones(6)), jnp.float32))

    def kl(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))

    def sampled(logits):
        logprobs = jax.nn.log_softmax(logits)
        sampling = jax.lax.stop_gradient(jnp.exp(logprobs))
        return jnp.sum(sampling * kl_penalty(logprobs, reference, estimator="k2"))

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(kl)(logits), atol=1e-6)


def test_k3_is_never_negative_and_exact_for_small_differences():
    """exp(-d) - 1 + d would lose almost all significant digits at d = 1e-3; expm1 preserves the value d^2 / 2."""
    d = jnp.array([-3.0, -1e-3, 0.0, 1e-3, 3.0])
    penalties = kl_penalty(d, jnp.zeros(5))
    assert (penalties >= 0).all()
    np.testing.assert_allclose(penalties[jnp.array([1, 3])], 5e-7, rtol=2e-3)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_elements_may_have_any_value(estimator, garbage):
    where = np.array([True, False, True, False])
    clean = np.array([-1.0, 0.0, -2.0, 0.0], np.float32)
    dirty = np.where(where, clean, garbage).astype(np.float32)
    loss = lambda x, y: kl_penalty(x, y - 0.5, estimator=estimator, where=where).sum()
    for index in (0, 1):
        gradient = jax.grad(loss, argnums=index)(jnp.asarray(dirty), jnp.asarray(dirty))
        expected = jax.grad(loss, argnums=index)(jnp.asarray(clean), jnp.asarray(clean))
        np.testing.assert_array_equal(gradient, expected)
        np.testing.assert_array_equal(gradient[~where], 0)
    values = kl_penalty(dirty, dirty - 0.5, estimator=estimator, where=where)
    np.testing.assert_array_equal(values[~where], 0)
    np.testing.assert_allclose(values[where], FORMULAE[estimator][0](np.full(2, 0.5)), rtol=1e-6)


def test_masking_a_token_equals_deleting_it(estimator):
    rng = np.random.default_rng(3)
    logprobs, ref_logprobs = -rng.exponential(size=(2, 6)).astype(np.float32)
    where = np.array([True, True, False, True, False, True])
    masked = kl_penalty(logprobs, ref_logprobs, estimator=estimator, where=where)
    deleted = kl_penalty(logprobs[where], ref_logprobs[where], estimator=estimator)
    np.testing.assert_array_equal(masked[where], deleted)


def test_jit_vmap_and_bfloat16(estimator):
    rng = np.random.default_rng(4)
    x, y = jnp.asarray(-rng.exponential(size=(2, 3, 4)), jnp.bfloat16)
    function = lambda x, y: kl_penalty(x, y, estimator=estimator)
    expected = function(x.astype(jnp.float32), y.astype(jnp.float32))
    assert function(x, y).dtype == jnp.float32
    np.testing.assert_array_equal(function(x, y), expected)
    np.testing.assert_allclose(jax.jit(function)(x, y), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(function)(x, y), expected, rtol=1e-6)


def test_the_error_for_an_unknown_estimator_names_it():
    with pytest.raises(ValueError, match="one of 'k1', 'k2', 'k3', got 'k4'"):
        kl_penalty(jnp.zeros(1), jnp.zeros(1), estimator="k4")  # pyright: ignore[reportArgumentType]
