"""Tests losses whose gradient is an attenuated cross-entropy gradient, in particular TrSFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    clip_attenuation,
    probability_attenuation,
    shifted_clip_attenuation,
    trsft_loss,
    trsft_loss_from_logprobs,
    unit_attenuation,
    variance_attenuation,
)

# The published gradient weights -d loss / d log p as functions of p, implemented independently of the library.
ATTENUATIONS = {
    "clip_0.1": (clip_attenuation(0.1), lambda p: min(1.0, p / 0.1)),
    "clip_1": (clip_attenuation(1.0), lambda p: p),
    "shifted": (shifted_clip_attenuation(0.1, 0.5), lambda p: min(1.0, p / 0.1) - 0.5 * p),
    "unit": (unit_attenuation(), lambda _: 1.0),
    "probability": (probability_attenuation(), lambda p: p),
    "variance": (variance_attenuation(), lambda p: p * (1 - p)),
}


@pytest.fixture(params=ATTENUATIONS)
def attenuation_and_weight(request):
    return ATTENUATIONS[request.param]


def test_trsft_values_by_hand():
    p = jnp.array([1.0, 0.5, 0.1, 0.05, 0.0])
    expected = [0.0, np.log(2), -np.log(0.1), 1 - np.log(0.1) - 0.5, 1 - np.log(0.1)]
    np.testing.assert_allclose(
        trsft_loss_from_logprobs(jnp.log(p), alpha=0.1), expected, rtol=1e-6, atol=1e-7
    )


def test_attenuation_equals_the_published_weight(attenuation_and_weight):
    attenuation, weight = attenuation_and_weight
    probs = np.array([0.0, 1e-6, 0.01, 0.1, 0.3, 0.999, 1.0], np.float32)
    np.testing.assert_allclose(attenuation(probs), [weight(p) for p in probs], rtol=1e-6)


def test_gradient_with_respect_to_logits_equals_the_published_formula(attenuation_and_weight):
    """The formula, in float64 NumPy, is d loss / d logits = -weight(p_y) * (onehot(y) - p)."""
    attenuation, weight = attenuation_and_weight
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 11)).astype(np.float32) * 3
    labels = rng.integers(0, 11, 64)

    def total(logits):
        logprobs = jax.nn.log_softmax(logits)[jnp.arange(64), labels]
        return attenuated_cross_entropy_from_logprobs(logprobs, attenuation=attenuation).sum()

    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    weights = np.array([weight(q) for q in p[np.arange(64), labels]])
    expected = -weights[:, None] * (np.eye(11)[labels] - p)
    gradient = jax.grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_trsft_gradient_equals_equation_3():
    """Equation 3 of the TRAPO paper is grad L = -1 / max(p, alpha) * grad p, here with respect to the logits."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 7)).astype(np.float32) * 2
    labels = rng.integers(0, 7, 50)
    gradient = jax.grad(lambda z: trsft_loss(z, labels, alpha=0.2).sum())(jnp.asarray(logits))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    p_y = p[np.arange(50), labels][:, None]
    grad_p = p_y * (np.eye(7)[labels] - p)
    np.testing.assert_allclose(gradient, -grad_p / np.maximum(p_y, 0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradients_match_finite_differences(attenuation_and_weight):
    attenuation, _ = attenuation_and_weight
    logprobs = jnp.log(jnp.array([0.9, 0.5, 0.25, 0.05, 0.01]))
    check_grads(
        lambda x: attenuated_cross_entropy_from_logprobs(x, attenuation=attenuation),
        (logprobs,),
        order=2,
        modes=("fwd", "rev"),
    )


def test_losses_are_zero_at_probability_one(attenuation_and_weight):
    attenuation, _ = attenuation_and_weight
    value = attenuated_cross_entropy_from_logprobs(jnp.zeros(1), attenuation=attenuation)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)


def test_shifted_values_by_hand():
    loss = attenuated_cross_entropy_from_logprobs(
        jnp.log(jnp.array([0.5, 0.02])), attenuation=shifted_clip_attenuation(0.1, 0.5)
    )
    above = -np.log(0.5) - 0.5 * 0.5
    below = 1 - np.log(0.1) - 0.02 / 0.1 - 0.5 * 0.98
    np.testing.assert_allclose(loss, [above, below], rtol=1e-6)


def test_shifted_gradient_equals_that_of_the_released_code():
    """The released `clip_low_and_shift` minimizes -p (1 / max(sg p, 0.1) - 0.5), where sg stops the gradient."""
    probs = jnp.array([0.9, 0.5, 0.1, 0.05, 0.001])
    released = lambda p: -p * (1 / jnp.maximum(jax.lax.stop_gradient(p), 0.1) - 0.5)
    ours = lambda p: attenuated_cross_entropy_from_logprobs(
        jnp.log(p), attenuation=shifted_clip_attenuation(0.1, 0.5)
    )
    np.testing.assert_allclose(
        jax.grad(lambda p: ours(p).sum())(probs),
        jax.grad(lambda p: released(p).sum())(probs),
        rtol=1e-5,
    )


def test_a_shift_of_zero_gives_the_clipped_attenuation():
    logprobs = jnp.log(jnp.array([0.5, 0.1, 0.02]))
    shifted = attenuated_cross_entropy_from_logprobs(
        logprobs, attenuation=shifted_clip_attenuation(0.1, jnp.float32(0.0))
    )
    np.testing.assert_allclose(shifted, trsft_loss_from_logprobs(logprobs, alpha=0.1), rtol=1e-6)


def test_custom_attenuations_give_the_right_gradient_and_a_surrogate_value():
    logprobs = jnp.log(jnp.array([0.5, 0.2]))
    loss = lambda x: attenuated_cross_entropy_from_logprobs(x, attenuation=jnp.square)
    np.testing.assert_allclose(loss(logprobs), -np.square([0.5, 0.2]) * logprobs, rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: loss(x).sum())(logprobs), [-0.25, -0.04], rtol=1e-6
    )
    assert loss(jnp.array([-jnp.inf]))[0] == 0


@pytest.mark.slow
def test_a_tiny_alpha_gives_the_cross_entropy_of_optax():
    rng = np.random.default_rng(2)
    logits, labels = jnp.asarray(rng.normal(size=(20, 9))), rng.integers(0, 9, 20)
    ours = lambda z: trsft_loss(z, labels, alpha=1e-30).sum()
    theirs = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).sum()
    np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), atol=1e-6)


def test_the_loss_for_alpha_one_is_one_minus_p():
    logprobs = jnp.log(jnp.array([1.0, 0.3, 0.01]))
    np.testing.assert_allclose(
        trsft_loss_from_logprobs(logprobs, alpha=1.0), 1 - np.exp(logprobs), atol=1e-6
    )


def test_loss_and_gradient_are_continuous_at_alpha():
    at = np.log(np.float32(0.1))
    below, above = np.nextafter(at, -9, dtype=np.float32), np.nextafter(at, 9, dtype=np.float32)
    f = lambda x: trsft_loss_from_logprobs(jnp.float32(x), alpha=0.1)
    np.testing.assert_allclose(f(below), f(above), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(f)(below), jax.grad(f)(above), rtol=1e-5)


def test_loss_is_bounded_with_zero_gradient_at_probability_zero():
    logits = jnp.array([[0.0, -jnp.inf, 1.0]])
    value, gradient = jax.value_and_grad(lambda z: trsft_loss(z, jnp.array([1])).sum())(logits)
    np.testing.assert_allclose(value, 1 - np.log(0.1), rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0001, float("nan")])
def test_the_error_for_an_alpha_out_of_range_names_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got"):
        trsft_loss(jnp.zeros((1, 2)), jnp.array([0]), alpha=alpha)


@pytest.mark.parametrize("shift", [-1, 1.5, float("nan")])
def test_the_error_for_a_shift_out_of_range_names_shift(shift):
    with pytest.raises(ValueError, match=r"shift must be in \[0, 1\], got"):
        shifted_clip_attenuation(0.1, shift)


def test_alpha_may_be_traced():
    logprobs = jnp.log(jnp.array([0.05, 0.5]))
    traced = jax.jit(lambda a: trsft_loss_from_logprobs(logprobs, alpha=a))(0.2)
    np.testing.assert_allclose(traced, trsft_loss_from_logprobs(logprobs, alpha=0.2), rtol=1e-6)


def test_the_second_derivative_is_correct():
    """d2 loss / dp2 is 1 / p^2 inside the trust region and 0 outside."""
    f = lambda p: trsft_loss_from_logprobs(jnp.log(p), alpha=0.1)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(0.5), 4.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(0.05), 0.0, atol=1e-3)


def test_masked_garbage_has_the_same_effect_as_zeros():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    labels = np.array([0, 1, -100, 7])
    where = np.array([True, True, False, False])
    dirty = logits.copy()
    dirty[2], dirty[3] = np.nan, np.inf
    clean = np.where(where[:, None], logits, 0)
    f = lambda z: trsft_loss(z, labels, where=where).sum()
    for got, expected in zip(
        jax.value_and_grad(f)(jnp.asarray(dirty)),
        jax.value_and_grad(f)(jnp.asarray(clean)),
        strict=True,
    ):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(trsft_loss(jnp.asarray(dirty), labels, where=where)[2:], 0)


def test_masking_a_token_equals_deleting_it():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(6, 5)))
    labels, where = jnp.arange(6) % 5, jnp.array([1, 0, 1, 1, 0, 1], bool)
    masked = trsft_loss(logits, labels, where=where)
    np.testing.assert_allclose(masked[where], trsft_loss(logits[where], labels[where]), rtol=1e-6)


@pytest.mark.slow
def test_axis_jit_vmap_and_bfloat16():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4, 7)), jnp.bfloat16)
    labels = jnp.arange(12).reshape(3, 4) % 7
    expected = trsft_loss(logits.astype(jnp.float32), labels)
    moved = jnp.moveaxis(logits, -1, 1)
    np.testing.assert_allclose(trsft_loss(moved, labels, axis=1), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(trsft_loss)(logits, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(trsft_loss)(logits, labels), expected, rtol=1e-6)
    assert trsft_loss(logits, labels).dtype == jnp.float32
    half = trsft_loss_from_logprobs(jnp.asarray([-1.0], jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_a_traced_shift_of_zero_equals_trsft_even_at_probability_zero():
    logprobs = jnp.array([-jnp.inf, -1.0])

    @jax.jit
    def value_and_grad(shift):
        attenuation = shifted_clip_attenuation(0.1, shift)
        loss = lambda x: attenuated_cross_entropy_from_logprobs(x, attenuation=attenuation)
        values, pullback = jax.vjp(loss, logprobs)
        return values, pullback(jnp.ones_like(values))[0]

    values, grads = value_and_grad(0.0)
    np.testing.assert_allclose(values, trsft_loss_from_logprobs(logprobs, alpha=0.1), rtol=1e-6)
    np.testing.assert_allclose(grads, [0.0, -1.0], atol=1e-6)


def test_alpha_is_a_tenth_by_default():
    logits, labels = jnp.array([[0.0, 5.0]]), jnp.array([0])
    logprobs = jax.nn.log_softmax(logits)[:, 0]
    expected = [1 - np.log(0.1) - np.exp(logprobs[0]) / 0.1]
    np.testing.assert_allclose(trsft_loss_from_logprobs(logprobs), expected, rtol=1e-6)
    np.testing.assert_allclose(trsft_loss(logits, labels), expected, rtol=1e-6)
