"""Tests that each cache operation gives the same contents in all storage layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.models import KVCache, PerLayer, PerLayerTransposed, Stacked

L, R, C, K, H = 2, 5, 6, 2, 3
LAYOUTS = (Stacked(), PerLayer(), PerLayerTransposed())
FILL = -1.0


def random_stacked(seed=0):
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(L, R, K, H, C)), rng.normal(size=(L, R, K, C, H))
    return KVCache(jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32))


def empty(layout):
    """Returns a cache filled with `FILL`."""
    cache = layout.init(L, R, C, K, H, "float32")
    filled = ([jnp.full_like(x, FILL) for x in part] for part in cache)
    if isinstance(layout, Stacked):
        return KVCache(*map(jnp.stack, filled))
    return KVCache(*filled)


def entries_of(cache, layout):
    """Returns the keys and values as one array `[2, L, R, C, K, H]`, whatever the layout of the cache."""
    keys, values = (np.stack(part) for part in cache)
    if isinstance(layout, PerLayer) and not isinstance(layout, PerLayerTransposed):
        return np.stack([keys, values])
    return np.stack([np.moveaxis(keys, -1, 2), np.moveaxis(values, 3, 2)])


def int32(*numbers):
    return jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_cache_has_the_expected_shape_and_dtype(layout):
    cache = layout.init(L, R, C, K, H, "bfloat16")
    assert entries_of(cache, layout).shape == (2, L, R, C, K, H)
    assert all(x.dtype == jnp.bfloat16 for part in cache for x in part)
    assert all(x.shape[layout.head_axis] == K for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_insert_copies_the_first_positions_of_the_first_rows(layout, count):
    stacked = random_stacked()
    rows, targets = int32(3, 1, 0), int32(*[0, 2, R][:count], *[R] * (3 - count))
    cache = layout.insert(empty(layout), stacked, rows, targets, jnp.int32(count), length=4)
    expected = np.full((2, L, R, C, K, H), FILL, np.float32)
    source = entries_of(stacked, Stacked())
    for row, target in [(3, 0), (1, 2)][:count]:
        expected[:, :, target, :4] = source[:, :, row, :4]
    np.testing.assert_array_equal(entries_of(cache, layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_copies_whole_rows(layout):
    stacked = random_stacked()
    rows = jnp.arange(R, dtype=jnp.int32)
    cache = layout.insert(empty(layout), stacked, rows, rows, jnp.int32(R), length=C)
    cache = layout.copy(cache, int32(4, 3, 0), int32(1, 0, R), jnp.int32(2))
    expected = entries_of(stacked, Stacked())
    expected[:, :, 1], expected[:, :, 0] = expected[:, :, 4], expected[:, :, 3]
    np.testing.assert_array_equal(entries_of(cache, layout), expected)


def test_append_stores_tokens_and_drops_tokens_that_are_out_of_range():
    layout, rng = Stacked(), np.random.default_rng(0)
    keys, values = rng.normal(size=(2, L, 3, 1, K, H)).astype(np.float32)
    cache = layout.append(empty(layout), (keys, values), int32(0, 1, 2), int32(5, C, 0))
    expected = np.full((2, L, R, C, K, H), FILL, np.float32)
    for i, (row, position) in {0: (0, 5), 2: (2, 0)}.items():
        expected[:, :, row, position] = np.stack([keys, values])[:, :, i, 0]
    np.testing.assert_array_equal(entries_of(cache, layout), expected)


@pytest.mark.parametrize(("num_rows", "length"), [(2, 4), (R, C), (7, 9)])
def test_resize_keeps_the_entries_that_fit(num_rows, length):
    layout, stacked = PerLayerTransposed(), random_stacked()
    rows = jnp.arange(R, dtype=jnp.int32)
    cache = layout.insert(empty(layout), stacked, rows, rows, jnp.int32(R), length=C)
    found = entries_of(layout.resize(cache, num_rows=num_rows, length=length), layout)
    assert found.shape == (2, L, num_rows, length, K, H)
    kept = np.s_[:, :, : min(R, num_rows), : min(C, length)]
    np.testing.assert_array_equal(found[kept], entries_of(stacked, Stacked())[kept])


def test_the_per_layer_layout_rejects_sliding_windows():
    q, kv = jnp.zeros((R, 1, 2 * K, H)), jnp.zeros((R, 1, K, H))
    cache = KVCache(*(part[0] for part in empty(PerLayer())))
    with pytest.raises(ValueError, match="does not support sliding windows"):
        PerLayer().attend(
            *(q, kv, kv, cache, jnp.zeros(R, jnp.int32)),
            view_len=None,
            scale=1.0,
            window=4,
            is_local=None,
            implementation="xla",
        )
