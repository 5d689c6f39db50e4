"""Tests the reductions. Each is sum(values * weights), where the weights depend only on the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trapo_jax.losses import (
    constant_mean,
    constant_mean_weights,
    constant_sum,
    constant_sum_weights,
    segment_mean_weights,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
)

VALUES = np.array([[1.0, 2.0, 4.0], [6.0, 9.0, 5.0], [7.0, 3.0, 8.0]], np.float32)
WHERE = np.array([[True, True, False], [True, False, False], [False, False, False]])
LENGTH = 5.0

# Each reduction, the function that computes its weights, and its hand-computed result for VALUES and WHERE.
REDUCTIONS = {
    "token_mean": (token_mean, token_mean_weights, 9 / 3),
    "sequence_mean": (sequence_mean, sequence_mean_weights, (1.5 + 6) / 2),
    "constant_sum": (
        lambda values, **options: constant_sum(values, length=LENGTH, **options),
        lambda where: constant_sum_weights(where, length=LENGTH),
        9 / 5,
    ),
    "constant_mean": (
        lambda values, **options: constant_mean(values, length=LENGTH, **options),
        lambda where: constant_mean_weights(where, length=LENGTH, num_sequences=len(where)),
        9 / 5 / 3,
    ),
}


@pytest.fixture(params=REDUCTIONS)
def name(request):
    return request.param


def test_values_by_hand(name):
    reduce, _, expected = REDUCTIONS[name]
    got = reduce(VALUES, where=WHERE)
    assert got.dtype == jnp.float32
    assert got.shape == ()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 5.0),
        ("sequence_mean", 5.0),
        ("constant_sum", 9.0),
        ("constant_mean", 3.0),
    ],
)
def test_without_mask_everything_counts(name, expected):
    np.testing.assert_allclose(REDUCTIONS[name][0](VALUES), expected, rtol=1e-6)


def test_weights_by_hand():
    np.testing.assert_allclose(token_mean_weights(WHERE), WHERE / 3, rtol=1e-6)
    np.testing.assert_allclose(
        sequence_mean_weights(WHERE), [[0.25, 0.25, 0], [0.5, 0, 0], [0, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(constant_sum_weights(WHERE, length=5), WHERE / 5, rtol=1e-6)
    np.testing.assert_allclose(
        constant_mean_weights(WHERE, length=5, num_sequences=4), WHERE / 20, rtol=1e-6
    )


def test_a_reduction_is_the_sum_of_values_times_weights(name):
    reduce, weights, _ = REDUCTIONS[name]
    weighted = np.where(WHERE, VALUES, 0) * weights(WHERE)
    assert weights(WHERE).dtype == jnp.float32
    np.testing.assert_allclose(reduce(VALUES, where=WHERE), weighted.sum(), rtol=1e-6)


def test_gradient_equals_the_weights(name):
    reduce, weights, _ = REDUCTIONS[name]
    gradient = jax.grad(lambda x: reduce(x, where=WHERE))(jnp.asarray(VALUES))
    np.testing.assert_allclose(gradient, weights(WHERE), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_weights_of_a_mean_sum_to_one(reduction):
    _, weights, _ = REDUCTIONS[reduction]
    np.testing.assert_allclose(weights(WHERE).sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights(WHERE)[~WHERE], 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_masked_elements_may_have_any_value(name, garbage):
    reduce, _, expected = REDUCTIONS[name]
    dirty = jnp.asarray(np.where(WHERE, VALUES, garbage))
    value, gradient = jax.value_and_grad(lambda x: reduce(x, where=WHERE))(dirty)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~WHERE], 0)


def test_empty_mask_gives_zero(name):
    reduce, weights, _ = REDUCTIONS[name]
    empty = np.zeros_like(WHERE)
    value, gradient = jax.value_and_grad(lambda x: reduce(x, where=empty))(jnp.asarray(VALUES))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(weights(empty), 0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_no_values_give_zero(name, shape):
    assert REDUCTIONS[name][0](np.zeros(shape)) == 0


def test_the_mean_of_one_token_is_its_value():
    """With one included token, the denominator is exactly 1, which `maximum(1, ...)` must not change."""
    one = np.zeros_like(WHERE)
    one[1, 2] = True
    assert token_mean(VALUES, where=one) == 5
    assert sequence_mean(VALUES, where=one) == 5


def test_where_of_lower_rank_broadcasts(name):
    reduce, _, _ = REDUCTIONS[name]
    row = np.array([True, False, True])
    full = np.broadcast_to(row, VALUES.shape)
    np.testing.assert_array_equal(reduce(VALUES, where=row), reduce(VALUES, where=full))
    column = np.array([[True], [False], [True]])
    full = np.broadcast_to(column, VALUES.shape)
    np.testing.assert_array_equal(reduce(VALUES, where=column), reduce(VALUES, where=full))


@pytest.mark.parametrize("axis", [0, -2])
def test_axis_is_the_token_axis(axis):
    np.testing.assert_allclose(
        sequence_mean(VALUES.T, where=WHERE.T, axis=axis),
        sequence_mean(VALUES, where=WHERE),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        sequence_mean_weights(WHERE.T, axis=axis), sequence_mean_weights(WHERE).T, rtol=1e-6
    )
    wide, where = np.ones((4, 2), np.float32), np.ones((4, 2), bool)
    np.testing.assert_allclose(
        constant_mean(wide, length=10, where=where, axis=axis), 8 / 10 / 2, rtol=1e-6
    )
    np.testing.assert_allclose(constant_mean(wide, length=10, where=where), 8 / 10 / 4, rtol=1e-6)


def test_rows_without_tokens_count_only_in_constant_mean():
    """`sequence_mean` excludes the third row of WHERE, whereas `constant_mean` counts it in the denominator."""
    np.testing.assert_allclose(sequence_mean(VALUES, where=WHERE), 3.75, rtol=1e-6)
    np.testing.assert_allclose(constant_mean(VALUES, length=1, where=WHERE), 3.0, rtol=1e-6)


def test_all_sequences_have_the_same_weight_whatever_their_lengths():
    """`sequence_mean` is a mean of means, so each of two sequences has half of the weight."""
    where = np.arange(10) < np.array([[10], [1]])
    weights = sequence_mean_weights(where)
    np.testing.assert_allclose(weights.sum(-1), [0.5, 0.5], rtol=1e-6)


def test_values_may_have_more_than_two_axes():
    values = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(sequence_mean(values, axis=1), values.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        constant_mean(values, length=6, axis=1), values.sum() / 6 / 8, rtol=1e-6
    )


@pytest.mark.parametrize("length", [0, -1, 0.0, float("nan")])
@pytest.mark.parametrize("reduce", [constant_sum, constant_mean])
def test_length_is_checked(reduce, length):
    with pytest.raises(ValueError, match=f"length must be > 0, got {length}"):
        reduce(VALUES, length=length)


def test_a_length_below_one_is_allowed():
    np.testing.assert_allclose(constant_sum(np.ones(2), length=0.5), 4.0, rtol=1e-6)


def test_length_may_be_traced():
    function = lambda length: constant_mean(VALUES, length=length, where=WHERE)
    np.testing.assert_allclose(jax.jit(function)(5.0), function(5.0), rtol=1e-6)


def test_bfloat16_values_are_summed_in_float32(name):
    """If the values were added in bfloat16, the sum of 257 ones would be 256."""
    values = jnp.full((1, 257), 1.0, jnp.bfloat16)
    got = REDUCTIONS[name][0](values)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, REDUCTIONS[name][0](np.ones((1, 257))), rtol=1e-6)


def test_jit(name):
    reduce, _, expected = REDUCTIONS[name]
    got = jax.jit(lambda x, where: reduce(x, where=where))(VALUES, WHERE)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@st.composite
def batches(draw):
    """Generates values, a mask (which may exclude all tokens of a row), and the index of each row's micro-batch."""
    rows = draw(st.integers(1, 6))
    shape = (rows, draw(st.integers(1, 5)))
    values = draw(arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    where = draw(arrays(bool, shape))
    parts = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return values, where, np.array(parts)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(sorted(REDUCTIONS)))
def test_any_split_into_micro_batches_adds_up(batch, name):
    """With weights computed for the whole batch, the weighted sums of its micro-batches add up to the reduction."""
    values, where, parts = batch
    reduce, weights, _ = REDUCTIONS[name]
    weights = np.asarray(weights(where))
    total = sum(np.sum((values * weights)[parts == part]) for part in range(4))
    np.testing.assert_allclose(total, reduce(values, where=where), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(sorted(REDUCTIONS)), st.integers(1, 4))
def test_the_amount_of_padding_does_not_matter(batch, name, width):
    values, where, _ = batch
    reduce, _, _ = REDUCTIONS[name]
    pad = ((0, 0), (0, width))
    padded = np.pad(values, pad, constant_values=np.nan)
    np.testing.assert_allclose(
        reduce(padded, where=np.pad(where, pad)),
        reduce(values, where=where),
        rtol=1e-5,
        atol=1e-5,
    )


def test_segment_mean_weights_by_hand():
    where = np.array([[True, True, False, True], [True, False, True, False]])
    segment_ids = np.array([[1, 1, 2, 2], [2, 3, 0, 0]])  # segment 2 continues in the next row
    weights = segment_mean_weights(where, segment_ids, num_segments=7)
    # Segments 0, 1, and 2 have one, two, and two included tokens.
    sixth = 1 / 6
    expected = [[sixth, sixth, 0, sixth], [sixth, 0, 2 * sixth, 0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == jnp.float32


def test_segment_mean_weights_with_one_segment_per_row_equal_sequence_mean_weights():
    segment_ids = np.broadcast_to(np.arange(3)[:, None], WHERE.shape)
    np.testing.assert_allclose(
        segment_mean_weights(WHERE, segment_ids, num_segments=3), sequence_mean_weights(WHERE)
    )


def test_segment_mean_weights_of_an_empty_mask_are_zero():
    weights = segment_mean_weights(np.zeros((2, 3), bool), np.ones((2, 3), int), num_segments=2)
    np.testing.assert_array_equal(weights, 0.0)


def test_segment_mean_weights_of_a_single_token_and_a_single_segment():
    where = np.array([[True, False], [False, False]])
    weights = segment_mean_weights(where, np.array([[1, 1], [2, 2]]), num_segments=3)
    np.testing.assert_array_equal(weights, np.float32(where))


def test_constant_mean_counts_rows_of_one_token():
    assert constant_mean(np.ones((3, 1)), length=1.0) == 1.0


def test_sequences_lie_along_the_last_axis_whatever_the_number_of_axes():
    where = np.array([[[True, True, False]], [[True, False, False]]])
    weights = sequence_mean_weights(where)
    np.testing.assert_allclose(weights, [[[0.25, 0.25, 0.0]], [[0.5, 0.0, 0.0]]])
