"""Attention behind two functions: a whole row, and one new token against a cache."""

import functools

import jax
import jax.numpy as jnp


def row_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Causal attention within segments. Pad positions (segment 0) give finite, unused values."""
    same_segment = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_segment[:, None], is_causal=True
    )


def token_attention(
    q_SNH: jax.Array,
    k_SKH: jax.Array,
    v_SKH: jax.Array,
    cached_k_SKHC: jax.Array,
    cached_v_SKCH: jax.Array,
    cached_lens_S: jax.Array,
) -> jax.Array:
    """Attention of one new token a slot to the slot's cache and to itself; `[S, N, H]`.

    The new key and value come beside the cache, not in it: the layer only reads the cache, and all
    layers' new entries are written at once afterwards, in place. Keys are cached with the position
    last, so that both products contract along contiguous memory without a transposed copy.
    """
    num_slots, num_heads, head_dim = q_SNH.shape
    num_kv_heads, cache_len = k_SKH.shape[1], cached_k_SKHC.shape[-1]
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q_SKGH = q_SNH.reshape(num_slots, num_kv_heads, -1, head_dim)
    own_score = einsum("SKGH,SKH->SKG", q_SKGH, k_SKH)[..., None]
    scores = einsum("SKGH,SKHC->SKGC", q_SKGH, cached_k_SKHC)
    in_cache = jnp.arange(cache_len) < cached_lens_S[:, None]
    scores = jnp.where(in_cache[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([scores, own_score], -1) * head_dim**-0.5)
    weights = weights.astype(v_SKH.dtype)
    values = einsum("SKGC,SKCH->SKGH", weights[..., :-1], cached_v_SKCH)
    values += weights[..., -1:] * v_SKH[:, :, None]
    return values.reshape(num_slots, num_heads, head_dim).astype(q_SNH.dtype)
