"""Tests log-probabilities and entropies computed from logits, or computed from hidden states in vocabulary slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trapo_jax.losses import entropy, linear_token_logprobs, token_logprobs

T, D, V = 12, 6, 23


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(T, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(rng.integers(0, V, T))


def dense(hidden, unembedding, labels, *, temperature=1.0, where=None):
    """Computes log-probabilities and entropies from materialized logits."""
    logits = jnp.matmul(hidden, unembedding, preferred_element_type=jnp.float32) / temperature
    return token_logprobs(logits, labels, where=where), entropy(logits, where=where)


def weighted_sum(logprobs, entropies):
    """Returns a scalar that depends on both results, with different weights for all tokens."""
    weights = jnp.cos(jnp.arange(logprobs.size, dtype=jnp.float32)).reshape(logprobs.shape)
    return jnp.sum(weights * logprobs) + 0.7 * jnp.sum(weights[::-1] * entropies)


def assert_close(got, expected, tolerance=1e-5):
    """Compares arrays with an absolute tolerance that is proportional to the largest expected element."""
    expected = np.asarray(expected, np.float64)
    largest = max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance * largest)


# From logits


def test_token_logprobs_by_hand():
    """The probabilities are softmax([0, log 3]) = [1/4, 3/4]."""
    logits = jnp.array([[0.0, np.log(3.0)], [5.0, 5.0]])
    logprobs = token_logprobs(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(logprobs, np.log([0.75, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(
        entropy(logits),
        [-0.75 * np.log(0.75) - 0.25 * np.log(0.25), np.log(2)],
        rtol=1e-6,
    )


def test_gradients_with_respect_to_logits_equal_the_formulas():
    """The formulas, in float64 NumPy, are d logprob = onehot - p and d entropy = -p (log p + H)."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 9)).astype(np.float32) * 2
    labels = rng.integers(0, 9, 40)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    h = -np.sum(p * np.log(p), -1, keepdims=True)
    assert_close(
        jax.grad(lambda z: token_logprobs(z, labels).sum())(jnp.asarray(logits)),
        np.eye(9)[labels] - p,
        1e-6,
    )
    assert_close(
        jax.grad(lambda z: entropy(z).sum())(jnp.asarray(logits)), -p * (np.log(p) + h), 1e-6
    )


@pytest.mark.slow
def test_check_grads_from_logits():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)), jnp.float32)
    check_grads(lambda z: token_logprobs(z, jnp.array([0, 2, 4])), (logits,), order=2)
    check_grads(entropy, (logits,), order=2)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_is_the_vocabulary_axis(axis):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 2, 1]])
    where = jnp.array([[True, False, True], [True, True, False]])
    moved = jnp.moveaxis(logits, -1, axis)
    np.testing.assert_allclose(
        token_logprobs(moved, labels, axis=axis, where=where),
        token_logprobs(logits, labels, where=where),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        entropy(moved, axis=axis, where=where), entropy(logits, where=where), rtol=1e-6
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_where_of_lower_rank_broadcasts_to_the_labels(axis):
    """The vocabulary is as long as the rows, so a mask on the wrong axis would still have a valid shape."""
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 3)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [2, 2, 1]])
    row = jnp.array([True, False, True])
    moved = jnp.moveaxis(logits, -1, axis)
    full = jnp.broadcast_to(row, (2, 3))
    np.testing.assert_allclose(
        token_logprobs(moved, labels, axis=axis, where=row),
        token_logprobs(logits, labels, where=full),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        entropy(moved, axis=axis, where=row), entropy(logits, where=full), rtol=1e-6
    )


def test_masked_logits_may_have_any_value():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    where = np.array([True, False, True, False])
    labels = np.array([1, -100, 4, 5])
    dirty = logits.copy()
    dirty[1], dirty[3] = np.nan, np.inf
    clean = np.where(where[:, None], logits, 0)
    for function in (
        lambda z: token_logprobs(z, labels, where=where),
        lambda z: entropy(z, where=where),
    ):
        values, pullback = jax.vjp(function, jnp.asarray(dirty))
        clean_values, clean_pullback = jax.vjp(function, jnp.asarray(clean))
        np.testing.assert_array_equal(values, clean_values)
        np.testing.assert_array_equal(values[~where], 0)
        (gradient,), (expected,) = (f(jnp.ones(4)) for f in (pullback, clean_pullback))
        np.testing.assert_array_equal(gradient, expected)
        np.testing.assert_array_equal(gradient[~where], 0)
        np.testing.assert_allclose(values[where], function(jnp.asarray(clean))[where])


def test_masking_a_token_equals_deleting_it():
    rng = np.random.default_rng(6)
    logits, labels = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.array([0, 1, 2, 3, 0])
    where = jnp.array([True, False, True, True, False])
    np.testing.assert_allclose(
        token_logprobs(logits, labels, where=where)[where],
        token_logprobs(logits[where], labels[where]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        entropy(logits, where=where)[where], entropy(logits[where]), rtol=1e-6
    )


@pytest.mark.parametrize("label", [-1, -100, 4, 5, 1000])
def test_label_out_of_range_gives_nan_unless_masked(label):
    labels = jnp.array([label, 1])
    logprobs = token_logprobs(jnp.zeros((2, 4)), labels)
    assert np.isnan(logprobs[0])
    np.testing.assert_allclose(logprobs[1], -np.log(4), rtol=1e-6)
    masked = token_logprobs(jnp.zeros((2, 4)), labels, where=jnp.array([False, True]))
    assert masked[0] == 0


@pytest.mark.parametrize("label", [0, 3])
def test_first_and_last_label_are_in_range(label):
    np.testing.assert_allclose(
        token_logprobs(jnp.zeros((1, 4)), jnp.array([label])), -np.log(4), rtol=1e-6
    )


def test_minus_infinite_logits_have_probability_zero():
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [7.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(entropy(logits), [np.log(2), 0], rtol=1e-6)
    gradient = jax.grad(lambda z: entropy(z).sum())(logits)
    np.testing.assert_allclose(gradient, np.zeros((2, 3)), atol=1e-7)
    assert token_logprobs(logits, jnp.array([1, 1]))[0] == -np.inf


def test_bfloat16_logits_are_converted_to_float32():
    logits = jnp.asarray(np.random.default_rng(7).normal(size=(5, 300)), jnp.bfloat16)
    labels = jnp.arange(5)
    for got, expected in (
        (token_logprobs(logits, labels), token_logprobs(logits.astype(jnp.float32), labels)),
        (entropy(logits), entropy(logits.astype(jnp.float32))),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_jit_and_vmap_from_logits():
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(2, 3, 5)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 4, 0]])
    expected = token_logprobs(logits, labels)
    np.testing.assert_allclose(jax.jit(token_logprobs)(logits, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(token_logprobs)(logits, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(entropy)(logits), entropy(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(entropy)(logits), entropy(logits), rtol=1e-6)


# From hidden states

# With T = 12 and V = 23, the vocabulary is processed in slices of two columns, in slices whose size does not divide V,
# or in a single slice.
CHUNK_SIZES = [1, 5, 7, T, T + 1, 1000]


def test_linear_token_logprobs_by_hand():
    """The scaled logits are [0, log 3] at temperature 1 and [0, (log 3) / 2] at temperature 2."""
    hidden, unembedding = jnp.ones((1, 1)), jnp.array([[0.0, np.log(3.0)]])
    logprobs, entropies = linear_token_logprobs(
        hidden, unembedding, jnp.array([1]), chunk_size=1, with_entropy=True
    )
    np.testing.assert_allclose(logprobs, np.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(entropies, -0.75 * np.log(0.75) - 0.25 * np.log(0.25), rtol=1e-6)
    warmer = linear_token_logprobs(
        hidden, unembedding, jnp.array([1]), chunk_size=1, temperature=2.0
    )
    np.testing.assert_allclose(warmer, np.log(np.sqrt(3) / (1 + np.sqrt(3))), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_equal_the_dense_computation(arrays, chunk_size, temperature):
    got = linear_token_logprobs(
        *arrays, chunk_size=chunk_size, temperature=temperature, with_entropy=True
    )
    for ours, theirs in zip(got, dense(*arrays, temperature=temperature), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    alone = linear_token_logprobs(*arrays, chunk_size=chunk_size, temperature=temperature)
    np.testing.assert_array_equal(alone, got[0])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradients_equal_the_dense_computation(arrays, chunk_size):
    """Compares gradients with respect to hidden states, unembedding, and temperature, through both results."""
    hidden, unembedding, labels = arrays

    def ours(hidden, unembedding, temperature):
        return weighted_sum(
            *linear_token_logprobs(
                hidden,
                unembedding,
                labels,
                chunk_size=chunk_size,
                temperature=temperature,
                with_entropy=True,
            )
        )

    def theirs(hidden, unembedding, temperature):
        return weighted_sum(*dense(hidden, unembedding, labels, temperature=temperature))

    gradients = (jax.grad(f, argnums=(0, 1, 2))(hidden, unembedding, 0.8) for f in (ours, theirs))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_each_result_alone(arrays, part):
    hidden, unembedding, labels = arrays

    def ours(hidden, unembedding):
        results = linear_token_logprobs(
            hidden, unembedding, labels, chunk_size=5, with_entropy=True
        )
        return results[part].sum()

    def theirs(hidden, unembedding):
        return dense(hidden, unembedding, labels)[part].sum()

    gradients = (jax.grad(f, argnums=(0, 1))(hidden, unembedding) for f in (ours, theirs))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected)


def test_check_grads_from_hidden_states(arrays):
    hidden, unembedding, labels = arrays
    check_grads(
        lambda h, u: linear_token_logprobs(h, u, labels, chunk_size=5, with_entropy=True),
        (hidden, unembedding),
        order=1,
        modes=("rev",),
        rtol=1e-2,
    )


def test_all_leading_axes_are_token_axes(arrays):
    hidden, unembedding, labels = arrays
    shaped = linear_token_logprobs(
        hidden.reshape(3, 4, D), unembedding, labels.reshape(3, 4), chunk_size=5, with_entropy=True
    )
    flat = linear_token_logprobs(hidden, unembedding, labels, chunk_size=5, with_entropy=True)
    for got, expected in zip(shaped, flat, strict=True):
        assert got.shape == (3, 4)
        np.testing.assert_array_equal(got.reshape(-1), expected)


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_masked_hidden_states_may_have_any_value(arrays, chunk_size):
    hidden, unembedding, labels = arrays
    where = np.arange(T) % 3 != 1
    dirty = np.array(hidden)
    dirty[1], dirty[4], dirty[7] = np.nan, np.inf, -np.inf
    labels = jnp.asarray(np.where(where, labels, -100))

    def ours(hidden, unembedding):
        return linear_token_logprobs(
            hidden, unembedding, labels, chunk_size=chunk_size, with_entropy=True, where=where
        )

    for values in ours(jnp.asarray(dirty), unembedding):
        np.testing.assert_array_equal(values[~where], 0)
    gradients = jax.grad(lambda *x: weighted_sum(*ours(*x)), argnums=(0, 1))(dirty, unembedding)
    expected = jax.grad(
        lambda h, u: weighted_sum(*dense(h, u, labels, where=where)), argnums=(0, 1)
    )(hidden, unembedding)
    np.testing.assert_array_equal(gradients[0][~where], 0)
    for got, wanted in zip(gradients, expected, strict=True):
        assert_close(got, wanted)


def test_linear_masking_a_token_equals_deleting_it(arrays):
    hidden, unembedding, labels = arrays
    where = jnp.arange(T) % 3 != 1
    masked = linear_token_logprobs(hidden, unembedding, labels, chunk_size=5, where=where)
    deleted = linear_token_logprobs(hidden[where], unembedding, labels[where], chunk_size=5)
    np.testing.assert_allclose(masked[where], deleted, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, -100, V, V + 1])
def test_linear_label_out_of_range_gives_nan_unless_masked(arrays, label):
    hidden, unembedding, labels = arrays
    labels = labels.at[2].set(label)
    logprobs = linear_token_logprobs(hidden, unembedding, labels, chunk_size=5)
    np.testing.assert_array_equal(np.isnan(logprobs), np.arange(T) == 2)
    where = jnp.arange(T) != 2
    masked = linear_token_logprobs(hidden, unembedding, labels, chunk_size=5, where=where)
    assert masked[2] == 0


@pytest.mark.parametrize("label", [0, V - 1])
def test_linear_first_and_last_label_are_in_range(arrays, label):
    hidden, unembedding, _ = arrays
    labels = jnp.full(T, label)
    got = linear_token_logprobs(hidden, unembedding, labels, chunk_size=5)
    np.testing.assert_allclose(got, dense(hidden, unembedding, labels)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, T])
def test_probability_zero_from_hidden_states(chunk_size):
    """A logit of -inf causes no NaN and adds nothing to the entropy, even if it is the only logit in its slice."""
    hidden, unembedding = jnp.full((T, 1), 1e10), jnp.array([[-1e30, 1e-10, 1e-10]])

    def ours(hidden, unembedding):
        return linear_token_logprobs(
            hidden, unembedding, jnp.arange(T) % 3, chunk_size=chunk_size, with_entropy=True
        )

    logprobs, entropies = ours(hidden, unembedding)
    np.testing.assert_allclose(logprobs, [-np.inf, -np.log(2), -np.log(2)] * 4, rtol=1e-6)
    np.testing.assert_allclose(entropies, np.log(2), rtol=1e-6)
    for part in (0, 1):
        total = lambda *x, part=part: ours(*x)[part].sum()
        gradients = jax.grad(total, argnums=(0, 1))(hidden, unembedding)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_large_logits_do_not_overflow():
    """The running maximum must be correct whether or not the largest logit comes first."""
    unembedding = jnp.array([[-500.0, 3.0, 500.0, 2.0]])
    for sign in (1.0, -1.0):
        hidden = jnp.full((4, 1), sign)
        labels = jnp.arange(4)
        got = linear_token_logprobs(hidden, unembedding, labels, chunk_size=1, with_entropy=True)
        for ours, theirs in zip(got, dense(hidden, unembedding, labels), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("hidden_dtype", "unembedding_dtype"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_bfloat16_products_accumulate_in_float32(arrays, hidden_dtype, unembedding_dtype):
    hidden, unembedding, labels = arrays
    hidden, unembedding = hidden.astype(hidden_dtype), unembedding.astype(unembedding_dtype)
    rounded = hidden.astype(jnp.float32), unembedding.astype(jnp.float32)

    def ours(hidden, unembedding):
        return linear_token_logprobs(hidden, unembedding, labels, chunk_size=5, with_entropy=True)

    got, expected = ours(hidden, unembedding), dense(rounded[0], rounded[1], labels)
    for values, wanted in zip(got, expected, strict=True):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda *x: weighted_sum(*ours(*x)), argnums=(0, 1))(hidden, unembedding)
    exact_sum = lambda h, u: weighted_sum(*dense(h, u, labels))
    wanted = jax.grad(exact_sum, argnums=(0, 1))(*rounded)
    assert [g.dtype.name for g in gradients] == [hidden_dtype, unembedding_dtype]
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert_close(gradient, exact, 1e-2)


@pytest.mark.slow
def test_linear_jit_and_vmap(arrays):
    hidden, unembedding, labels = arrays
    function = lambda h, labels: linear_token_logprobs(h, unembedding, labels, chunk_size=3)
    expected = function(hidden, labels)
    np.testing.assert_allclose(jax.jit(function)(hidden, labels), expected, rtol=1e-5)
    rows, row_labels = hidden.reshape(3, 4, D), labels.reshape(3, 4)
    by_row = jax.vmap(function)(rows, row_labels)
    np.testing.assert_allclose(by_row.reshape(-1), expected, rtol=1e-5)
    total = lambda h: function(h, labels).sum()
    row_total = lambda h: jax.vmap(function)(h, row_labels).sum()
    assert_close(jax.grad(row_total)(rows).reshape(T, D), jax.grad(total)(hidden))


def test_no_tokens_give_no_values(arrays):
    _, unembedding, _ = arrays
    total = lambda h, u: linear_token_logprobs(h, u, jnp.zeros(0, int), chunk_size=4).sum()
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(jnp.zeros((0, D)), unembedding)
    assert value == 0
    assert gradients[0].shape == (0, D)
    np.testing.assert_array_equal(gradients[1], 0)


def test_temperature_may_be_traced(arrays):
    function = lambda t: linear_token_logprobs(*arrays, chunk_size=5, temperature=t)
    np.testing.assert_allclose(jax.jit(function)(0.5), function(0.5), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunk_size_is_checked(arrays, chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be >= 1, got {chunk_size}"):
        linear_token_logprobs(*arrays, chunk_size=chunk_size)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_checked(arrays, temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        linear_token_logprobs(*arrays, chunk_size=4, temperature=temperature)


def temporary_bytes(function, *, tokens, width, vocab, dtype):
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct((width, vocab), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    total = lambda *x: weighted_sum(*function(*x))
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_bounded_by_the_chunk_size(dtype):
    """The sizes are about 1/16 of the defaults of `tools/measure_logprob_memory.py`.

    The bound rules out dense logits (16.8 MB), a float32 copy of a bfloat16 unembedding (8.4 MB), and a second copy of
    the unembedding's gradient (4.2 MB or more).
    """
    sizes = {"tokens": 512, "width": 256, "vocab": 8192, "dtype": dtype}
    chunk_logits = 32 * sizes["vocab"] * 4
    dense_logits = sizes["tokens"] * sizes["vocab"] * 4
    activations = sizes["tokens"] * sizes["width"] * 4
    sliced = temporary_bytes(
        lambda *x: linear_token_logprobs(*x, chunk_size=32, with_entropy=True), **sizes
    )
    assert sliced < 3 * chunk_logits + 3 * activations + 100_000
    assert sliced < dense_logits / 3
    assert temporary_bytes(dense, **sizes) > dense_logits
