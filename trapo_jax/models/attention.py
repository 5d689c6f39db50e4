"""Computes attention within whole rows, and from new tokens to a KV cache."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from trapo_jax.types import BATCH_AXES, TENSOR_AXIS

Implementation = Literal["auto", "xla", "cudnn", "splash", "splash_interpreted"]
# Tile sizes in tokens; the largest one that divides the row length is used.
SPLASH_BLOCKS = (512, 256, 128)


def row_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    context_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    is_local: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Computes causal attention within segments.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys, and values; each key-value head is shared by N / K query heads.
      segment_ids_BT: int32; tokens attend only to tokens of the same segment. Padding is segment 0.
      context_ids_BT: int32; tokens also attend to tokens of this segment, such as a prompt that several segments share.
        None if there are no shared segments. "splash" does not support it.
      positions_BT: int32, positions of the tokens, for the window; the positions in the row if None.
      scale: multiplier for the scores, usually `H ** -0.5`.
      window: a token attends to itself and to the `window - 1` tokens before it. If None, a token attends to all tokens
        before it.
      is_local: bool scalar, whether the window applies. If None, the window applies.
      implementation: "xla" runs on all devices; "cudnn" runs on NVIDIA GPUs in half precision; "splash" runs on TPUs if
        T and H are multiples of 128; "splash_interpreted" runs on all devices, but slowly; "auto" chooses "xla",
        "cudnn", or "splash" based on the device, the dtype, and the shapes.

    Returns:
      The result `[B, T, N, H]`. Values at padding positions are finite but meaningless.
    """
    chosen = _choose(implementation, q_BTNH.shape[1], q_BTNH.shape[3], q_BTNH.dtype.name)
    if chosen in ("splash", "splash_interpreted"):
        assert context_ids_BT is None, "splash attention does not support shared segments"
        interpret = chosen == "splash_interpreted"
        splash = functools.partial(_splash_attention, scale=scale, interpret=interpret)
        local = functools.partial(splash, window=window)
        if window is None or is_local is None:
            return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        full = functools.partial(splash, window=None)
        return jax.lax.cond(is_local, local, full, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    mask = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if context_ids_BT is not None:
        mask |= context_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if window is not None:
        if positions_BT is None:
            positions_BT = jnp.arange(segment_ids_BT.shape[1])[None]
        near = positions_BT[:, :, None] - positions_BT[:, None, :] < window
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
    new_STKH: tuple[jax.Array, jax.Array] | None,
    cached_k_SKHC: jax.Array,
    cached_v_SKCH: jax.Array,
    cached_lens_S: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    is_local: jax.Array | None = None,
) -> jax.Array:
    """Computes causal attention from T new tokens per slot to the slot's cached tokens and to each other.

    The position is the last axis of cached keys, so that both products contract along contiguous memory without a
    transposed copy.

    Args:
      q_STNH: queries of the new tokens.
      new_STKH: keys and values of the new tokens; if None, they are in the cache, after `cached_lens_S` positions.
      cached_k_SKHC, cached_v_SKCH: the cache.
      cached_lens_S: int32, number of filled positions of each slot, excluding the new tokens.
      scale, window, is_local: see `row_attention`.

    Returns:
      `[S, T, N, H]`.
    """
    num_slots, num_new, num_heads, head_dim = q_STNH.shape
    num_kv_heads, cache_len = cached_v_SKCH.shape[1:3]
    group = num_heads // num_kv_heads
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Merge query heads and new tokens into one axis of Q = N / K * T queries per key-value head, so that one batched
    # matmul suffices.
    q_SKGTH = q_STNH.reshape(num_slots, num_new, num_kv_heads, group, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    q_SKQH = q_SKGTH.reshape(num_slots, num_kv_heads, group * num_new, head_dim)
    scores = einsum("SKQH,SKHC->SKQC", q_SKQH, cached_k_SKHC)
    query = jnp.tile(jnp.arange(num_new), group)[:, None]  # [Q, 1]: index of the new token
    cached, lens = jnp.arange(cache_len), cached_lens_S[:, None, None]
    is_visible = cached < (lens if new_STKH else lens + query + 1)
    is_global = False if is_local is None else ~is_local
    if window is not None:
        is_visible &= (lens + query - cached < window) | is_global
    scores = jnp.where(is_visible[:, None], scores, -jnp.inf)
    if new_STKH:
        to_new = einsum("SKQH,STKH->SKQT", q_SKQH, new_STKH[0])
        new = jnp.arange(num_new)
        is_new_visible = new <= query
        if window is not None:
            is_new_visible &= (query - new < window) | is_global
        scores = jnp.concatenate([scores, jnp.where(is_new_visible, to_new, -jnp.inf)], axis=-1)
    weights = jax.nn.softmax(scores * scale).astype(cached_v_SKCH.dtype)
    values = einsum("SKQC,SKCH->SKQH", weights[..., :cache_len], cached_v_SKCH)
    if new_STKH:
        values += einsum("SKQT,STKH->SKQH", weights[..., cache_len:], new_STKH[1])
    values = values.reshape(q_SKGTH.shape).transpose(0, 3, 1, 2, 4)
    return values.reshape(q_STNH.shape).astype(q_STNH.dtype)


def decode_attention(
    q_SNH: jax.Array,
    k_RCKH: jax.Array,
    v_RCKH: jax.Array,
    lens_S: jax.Array,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Computes attention from one token per slot to the first `lens_S` positions of the slot's cache.

    The cache has cuDNN's axis order. cuDNN reads only the first `lens_S` positions, whereas XLA reads all of them.

    Args:
      q_SNH: queries of the tokens.
      k_RCKH, v_RCKH: the cache of R >= S slots; only the first S are used.
      lens_S: int32, number of filled positions of each slot, including the new token.
      scale, implementation: see `row_attention`.

    Returns:
      `[S, N, H]`.
    """
    num_slots = len(q_SNH)
    if _choose(implementation, 1, q_SNH.shape[2], q_SNH.dtype.name) == "cudnn":
        # Slicing the cache would copy it. Instead, pass all R slots; unused slots have length 0.
        num_unused = len(k_RCKH) - num_slots
        q_R1NH = jnp.pad(q_SNH, ((0, num_unused), (0, 0), (0, 0)))[:, None]
        lens_R = jnp.pad(lens_S, (0, num_unused))
        attended = jax.nn.dot_product_attention(
            q_R1NH,
            k_RCKH,
            v_RCKH,
            scale=scale,
            query_seq_lengths=jnp.minimum(lens_R, 1),
            key_value_seq_lengths=lens_R,
            implementation="cudnn",
        )
        return attended[:num_slots, 0]
    is_filled = jnp.arange(k_RCKH.shape[1]) < lens_S[:, None]
    attended = jax.nn.dot_product_attention(
        q_SNH[:, None],
        k_RCKH[:num_slots],
        v_RCKH[:num_slots],
        mask=is_filled[:, None, None],
        scale=scale,
        implementation="xla",
    )
    return attended[:, 0]


def is_for_cudnn(platform: str, dtype: str, head_dim: int) -> bool:
    """Returns whether cuDNN attention supports a platform, dtype, and head size."""
    return platform == "gpu" and dtype in ("bfloat16", "float16") and head_dim in range(8, 129, 8)


def supports_shared_segments(
    implementation: Implementation, *, row_len: int, head_dim: int, dtype: str
) -> bool:
    """Returns whether `row_attention` accepts `context_ids_BT` for rows of this length."""
    return not _choose(implementation, row_len, head_dim, dtype).startswith("splash")


def _choose(implementation: Implementation, length: int, head_dim: int, dtype: str) -> Any:
    if implementation != "auto":
        return implementation
    device = jax.default_backend()
    if device == "tpu" and length % 128 == 0 and head_dim % 128 == 0:
        return "splash"
    if is_for_cudnn(device, dtype, head_dim):
        return "cudnn"
    return "xla"


def _splash_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, scale, window, interpret):
    """Computes block-sparse flash attention with Pallas, which skips masked blocks and materializes no `[T, T]` scores.

    Since the compiler cannot partition a kernel, `shard_map` runs the kernel on each device's rows and heads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def per_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
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

        def per_row(q_TNH, k_TKH, v_TKH, segment_ids_T):
            heads_first = (x.swapaxes(0, 1) for x in (q_TNH * scale, k_TKH, v_TKH))
            segments = splash.SegmentIds(segment_ids_T, segment_ids_T)
            attended: Any = kernel(*heads_first, segment_ids=segments)
            return attended.swapaxes(0, 1)

        return jax.vmap(per_row)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return per_device(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads, rows = P(BATCH_AXES, None, TENSOR_AXIS, None), P(BATCH_AXES, None)
    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
