"""Tests the distribution and the log-probabilities of sampled tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.sampling.draw import BLOCK_LEN, draw_tokens, inverse_cdf, truncate


def test_inverse_cdf_by_hand():
    probs = jnp.tile(jnp.array([[0.0], [0.25], [0.0], [0.5], [0.25], [0.0]]), 6)
    uniform = jnp.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.99999994])
    np.testing.assert_array_equal(inverse_cdf(probs, uniform), [1, 1, 3, 3, 4, 4])


@pytest.mark.slow
def test_inverse_cdf_over_many_blocks_never_selects_a_token_of_probability_zero():
    rng = np.random.default_rng(0)
    probs = rng.random(3 * BLOCK_LEN + 17).astype(np.float32)
    probs[rng.random(probs.size) < 0.5] = 0.0
    probs /= probs.sum()
    uniform = jnp.asarray(np.append(rng.random(5000), [0.0, 1 - 2**-24]), jnp.float32)
    tokens = np.asarray(inverse_cdf(jnp.tile(probs[:, None], uniform.size), uniform))
    assert (probs[tokens] > 0).all()
    exact = np.searchsorted(np.cumsum(probs, dtype=np.float64), uniform, side="right")
    assert (tokens == exact).mean() > 0.99  # rounding moves the other draws across a boundary


@pytest.mark.slow
def test_draws_follow_the_distribution():
    """Applies a chi-square test to 200,000 draws: one cell for each of the 200 likeliest tokens, one for the rest."""
    rng = np.random.default_rng(0)
    vocab_size, num_rows, num_calls = 50_000, 2000, 100
    logits = (3 * rng.normal(size=vocab_size)).astype(np.float32)
    probs = np.exp(logits - logits.max(), dtype=np.float64)
    probs /= probs.sum()
    one_row = lambda key, position, logits: draw_tokens(
        key[None], position[None], logits[:, None], jnp.ones(1)
    )[0][0]
    draw = jax.jit(
        jax.vmap(one_row, in_axes=(0, None, None))
    )  # all rows share one array of logits, which saves memory
    keys = jax.random.split(jax.random.key(3), num_rows)
    tokens = np.concatenate([draw(keys, jnp.int32(p), logits) for p in range(num_calls)])
    top = np.argsort(probs)[::-1][:200]
    counts = np.bincount(tokens, minlength=probs.size)
    observed = np.append(counts[top], counts.sum() - counts[top].sum())
    expected = np.append(probs[top], 1 - probs[top].sum()) * tokens.size
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < 277, statistic  # chi-square, 200 degrees of freedom, p = 0.0003


@pytest.mark.slow
def test_temperature_zero_is_greedy_and_other_temperatures_scale_the_logits():
    logits = jnp.array([1.0, 3.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs = draw_tokens(
        keys, jnp.zeros(2), jnp.stack([logits] * 2, axis=1), jnp.array([0.0, 0.5])
    )
    assert tokens[0] == 1
    np.testing.assert_allclose(logprobs[0], jax.nn.log_softmax(logits)[1], rtol=1e-6)
    np.testing.assert_allclose(logprobs[1], jax.nn.log_softmax(logits / 0.5)[tokens[1]], rtol=1e-6)


@pytest.mark.slow
def test_logprobs_account_for_a_long_tail_of_improbable_tokens():
    """If the tail's probabilities were added one by one to 1 in float32, the sum would remain 1."""
    vocab_size, num_rows = 150_000, 4
    logits = np.full((vocab_size, num_rows), np.log(1e-8), np.float32)
    logits[0] = 0.0
    keys = jax.random.split(jax.random.key(0), num_rows)
    tokens, logprobs = draw_tokens(keys, jnp.zeros(num_rows), logits, jnp.zeros(num_rows))
    np.testing.assert_array_equal(tokens, 0)
    np.testing.assert_allclose(logprobs, -np.log1p(1e-8 * (vocab_size - 1)), rtol=2e-3)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3]),
        (1.0, 2, [1, 2]),
        (0.5, 0, [2]),  # token 2 alone reaches top_p
        (0.51, 0, [1, 2]),
        (0.79, 0, [1, 2]),
        (0.81, 0, [0, 1, 2, 3]),  # tokens 0 and 3 are equally likely, so both are kept
        (0.7, 3, [1, 2]),  # cumulative probabilities among the top three: .5 / .9 and .8 / .9
        (0.01, 0, [2]),
    ],
)
def test_truncation_by_hand(top_p, top_k, kept):
    logits = jnp.log(jnp.array([0.1, 0.3, 0.5, 0.1]))
    got = truncate(logits[:, None], jnp.array([top_p]), jnp.array([top_k]))[:, 0]
    assert np.flatnonzero(np.isfinite(got)).tolist() == kept
    np.testing.assert_array_equal(got[np.array(kept)], logits[np.array(kept)])
