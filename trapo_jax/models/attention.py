"""Attention behind two functions: whole rows, and new tokens against a cache."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from trapo_jax.types import BATCH_AXES, TENSOR_AXIS

Implementation = Literal["auto", "xla", "cudnn", "splash", "splash_interpreted"]
SPLASH_BLOCKS = (512, 256, 128)  # tokens of a tile: the largest that divides the row


def row_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    is_local: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Causal attention within segments, `[B, T, N, H]`. Pad positions (segment 0) give finite, unused values.

    Args:
      q_BTNH, k_BTKH, v_BTKH: query heads in groups of N / K to a key-value head.
      segment_ids_BT: int32; tokens see their own segment.
      scale: factor of the scores, usually `H ** -0.5`.
      window: a token sees itself and the `window - 1` before it; None for all.
      is_local: bool scalar; where False the window does not apply. None: it applies.
      implementation: "xla" anywhere; "cudnn" on NVIDIA GPUs, half precision; "splash" on TPUs, T and H
        multiples of 128, and "splash_interpreted" anywhere, slowly; "auto" takes what the device and the
        shapes allow.
    """
    chosen = _choose(implementation, q_BTNH)
    if chosen in ("splash", "splash_interpreted"):
        interpret = chosen == "splash_interpreted"
        splash = functools.partial(_splash_attention, scale=scale, interpret=interpret)
        local = functools.partial(splash, window=window)
        if window is None or is_local is None:
            return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        full = functools.partial(splash, window=None)
        return jax.lax.cond(is_local, local, full, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    mask = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if window is not None:
        index = jnp.arange(segment_ids_BT.shape[1])
        near = index[:, None] - index[None, :] < window
        mask &= near if is_local is None else near | ~is_local
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask[:, None],
        is_causal=True,
        scale=scale,
        implementation=chosen,
    )


def cached_attention(
    q_STNH: jax.Array,
    k_STKH: jax.Array,
    v_STKH: jax.Array,
    cached_k_SKHC: jax.Array,
    cached_v_SKCH: jax.Array,
    cached_lens_S: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    is_local: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of T new tokens a slot to the slot's cache and to each other; `[S, T, N, H]`.

    The new keys and values come beside the cache, not in it: the layer only reads the cache, and all
    layers' new entries are written at once afterwards, in place. Keys are cached with the position
    last, so that both products contract along contiguous memory without a transposed copy.
    `scale`, `window` and `is_local` are those of `row_attention`.
    """
    num_slots, num_new, num_heads, head_dim = q_STNH.shape
    num_kv_heads, cache_len = k_STKH.shape[2], cached_k_SKHC.shape[-1]
    group = num_heads // num_kv_heads
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Q: the queries of a key-value head, its group's heads times the new tokens. One plain batched matmul.
    q_SKGTH = q_STNH.reshape(num_slots, num_new, num_kv_heads, group, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    q_SKQH = q_SKGTH.reshape(num_slots, num_kv_heads, group * num_new, head_dim)
    to_cached = einsum("SKQH,SKHC->SKQC", q_SKQH, cached_k_SKHC)
    to_new = einsum("SKQH,STKH->SKQT", q_SKQH, k_STKH)
    query = jnp.tile(jnp.arange(num_new), group)[:, None]  # [Q, 1]: which new token asks
    cached, new, lens = jnp.arange(cache_len), jnp.arange(num_new), cached_lens_S[:, None, None]
    sees_cached, sees_new = cached < lens, new <= query
    if window is not None:
        everywhere = False if is_local is None else ~is_local
        sees_cached &= (lens + query - cached < window) | everywhere
        sees_new &= (query - new < window) | everywhere
    to_cached = jnp.where(sees_cached[:, None], to_cached, -jnp.inf)
    to_new = jnp.where(sees_new, to_new, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([to_cached, to_new], axis=-1) * scale)
    weights = weights.astype(v_STKH.dtype)
    values = einsum("SKQC,SKCH->SKQH", weights[..., :cache_len], cached_v_SKCH)
    values += einsum("SKQT,STKH->SKQH", weights[..., cache_len:], v_STKH)
    values = values.reshape(q_SKGTH.shape).transpose(0, 3, 1, 2, 4)
    return values.reshape(q_STNH.shape).astype(q_STNH.dtype)


def _choose(implementation: Implementation, q_BTNH: jax.Array) -> Any:
    if implementation != "auto":
        return implementation
    device = jax.default_backend()
    if device == "tpu" and q_BTNH.shape[1] % 128 == 0 and q_BTNH.shape[3] % 128 == 0:
        return "splash"
    if device == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla"


def _splash_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, scale, window, interpret):
    """Pallas' block-sparse flash attention: no `[T, T]` scores, and no work on what is masked.

    The compiler cannot split a kernel by itself: each device runs it on its rows and heads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def on_a_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        length, num_heads = q_BTNH.shape[1:3]
        mask = splash.CausalMask((length, length))
        if window is not None:
            mask &= splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
        block = next(size for size in SPLASH_BLOCKS if length % size == 0)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * num_heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

        def one_row(q_TNH, k_TKH, v_TKH, segment_ids_T):
            heads_first = (x.swapaxes(0, 1) for x in (q_TNH * scale, k_TKH, v_TKH))
            segments = splash.SegmentIds(segment_ids_T, segment_ids_T)
            attended: Any = kernel(*heads_first, segment_ids=segments)
            return attended.swapaxes(0, 1)

        return jax.vmap(one_row)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return on_a_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads, rows = P(BATCH_AXES, None, TENSOR_AXIS, None), P(BATCH_AXES, None)
    return jax.shard_map(
        on_a_device,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
