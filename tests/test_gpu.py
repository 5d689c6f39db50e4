"""Compares cuDNN attention with XLA attention.

Run `pytest -n 0 tests/test_gpu.py` on a machine with an NVIDIA GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.models.attention import decode_attention, row_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def distance(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("window", [None, 64])
def test_row_attention_and_its_gradients_match_xla(window):
    num_rows, length = 3, 256
    arrays = [normal(i, num_rows, length, n, HEAD_DIM) for i, n in enumerate((8, 2, 2))]
    segments = np.sort(np.random.default_rng(0).integers(1, 5, (num_rows, length)))
    segments[:, -30:] = 0

    def loss(q, k, v, implementation):
        out = row_attention(
            q,
            k,
            v,
            jnp.asarray(segments, jnp.int32),
            scale=HEAD_DIM**-0.5,
            window=window,
            implementation=implementation,
        )
        weights = (segments > 0)[..., None, None] * np.sin(np.arange(HEAD_DIM))
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (by_cudnn, out), (by_xla, expected) = (grad(*arrays, name) for name in ("cudnn", "xla"))
    valid = segments > 0
    assert distance(out[valid], expected[valid]) < 1e-2
    for ours, theirs in zip(by_cudnn, by_xla, strict=True):
        assert distance(ours, theirs) < 1e-2


def test_decode_attention_matches_xla_for_slots_of_different_lengths():
    num_rows, num_slots, length = 8, 6, 96
    q = normal(0, num_slots, NUM_HEADS, HEAD_DIM)
    k, v = (normal(i, num_rows, length, NUM_KV_HEADS, HEAD_DIM) for i in (1, 2))
    lens = jnp.array([1, 5, 96, 33, 64, 2], jnp.int32)
    attend = functools.partial(decode_attention, scale=HEAD_DIM**-0.5)
    by_cudnn = jax.jit(functools.partial(attend, implementation="cudnn"))(q, k, v, lens)
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), lens, implementation="xla")
    assert distance(by_cudnn, exact) < 1e-2
