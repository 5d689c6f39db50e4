"""Tests entropy-dependent losses, with and without masks, against values computed by hand or in explicit loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.losses import entropy_weighted_cross_entropy, segment_mean, top_of_segment


def test_weighted_cross_entropy_by_hand():
    logprobs = jnp.array([-1.0, -2.0])
    entropies = jnp.log(jnp.array([2.0, 4.0]))
    weaker = entropy_weighted_cross_entropy(logprobs, entropies, sign=-1.0)
    stronger = entropy_weighted_cross_entropy(logprobs, entropies, sign=1.0)
    np.testing.assert_allclose(weaker, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(stronger, [2.0, 8.0], rtol=1e-6)


def test_gradient_flows_only_through_unmasked_logprobs():
    where = jnp.array([True, False])
    total = lambda logprobs, entropies: jnp.sum(
        entropy_weighted_cross_entropy(logprobs, entropies, sign=-1.0, where=where)
    )
    logprobs, entropies = jnp.array([-1.0, jnp.nan]), jnp.array([0.0, jnp.inf])
    by_logprobs, by_entropies = jax.grad(total, argnums=(0, 1))(logprobs, entropies)
    np.testing.assert_array_equal(by_logprobs, [-1.0, 0.0])
    np.testing.assert_array_equal(by_entropies, [0.0, 0.0])
    assert total(logprobs, entropies) == 1.0


def random_segments(seed):
    """Returns values with ties, ids of up to five contiguous segments in each of three rows, and a mask."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 5, (3, 17)))[:, ::-1] + 5 * np.arange(3)[:, None]
    return rng.integers(0, 6, (3, 17)) / 2, ids.copy(), rng.random((3, 17)) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_segment_mean_equals_a_loop(seed):
    values, ids, where = random_segments(seed)
    found = segment_mean(np.where(where, values, np.nan), ids, num_segments=15, where=where)
    for i in np.unique(ids):
        chosen = values[(ids == i) & where]
        expected = chosen.mean() if chosen.size else 0.0
        np.testing.assert_allclose(found[ids == i], expected, rtol=1e-6)
    np.testing.assert_allclose(
        segment_mean(values[0], np.zeros(17, int), num_segments=1)[0], values[0].mean(), rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_top_of_segment_equals_a_loop(seed, share):
    values, ids, where = random_segments(seed)
    found = top_of_segment(np.where(where, values, np.nan), ids, share=share, where=where)
    expected = np.zeros_like(where)
    for row in range(3):
        for i in np.unique(ids[row]):
            (places,) = np.nonzero((ids[row] == i) & where[row])
            best = sorted(places, key=lambda t: (-values[row, t], t))
            expected[row, best[: int(np.ceil(share * len(places)))]] = True
    np.testing.assert_array_equal(found, expected)
    assert found.any()
