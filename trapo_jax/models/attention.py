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
    new_STKH: tuple[jax.Array, jax.Array] | None,
    cached_k_SKHC: jax.Array,
    cached_v_SKCH: jax.Array,
    cached_lens_S: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    is_local: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of T new tokens a slot to the slot's cache and to each other; `[S, T, N, H]`.

    The new tokens' keys and values come beside the cache: the layer only reads the cache, and all layers' new
    entries are written at once afterwards, in place. Or they are in the cache already, behind `cached_lens_S`
    positions: then `new_STKH` is None. Keys are cached with the position last, so that both products contract
    along contiguous memory without a transposed copy.
    `scale`, `window` and `is_local` are those of `row_attention`.
    """
    num_slots, num_new, num_heads, head_dim = q_STNH.shape
    num_kv_heads, cache_len = cached_v_SKCH.shape[1:3]
    group = num_heads // num_kv_heads
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Q: the queries of a key-value head, its group's heads times the new tokens. One plain batched matmul.
    q_SKGTH = q_STNH.reshape(num_slots, num_new, num_kv_heads, group, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    q_SKQH = q_SKGTH.reshape(num_slots, num_kv_heads, group * num_new, head_dim)
    scores = einsum("SKQH,SKHC->SKQC", q_SKQH, cached_k_SKHC)
    query = jnp.tile(jnp.arange(num_new), group)[:, None]  # [Q, 1]: which new token asks
    cached, lens = jnp.arange(cache_len), cached_lens_S[:, None, None]
    sees = cached < (lens if new_STKH else lens + query + 1)
    everywhere = False if is_local is None else ~is_local
    if window is not None:
        sees &= (lens + query - cached < window) | everywhere
    scores = jnp.where(sees[:, None], scores, -jnp.inf)
    if new_STKH:
        to_new = einsum("SKQH,STKH->SKQT", q_SKQH, new_STKH[0])
        new = jnp.arange(num_new)
        sees_new = new <= query
        if window is not None:
            sees_new &= (query - new < window) | everywhere
        scores = jnp.concatenate([scores, jnp.where(sees_new, to_new, -jnp.inf)], axis=-1)
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
    """Attention of one token a slot to the first `lens_S` positions of its cache, its own the last; `[S, N, H]`.

    Of R >= S slots the first S are meant. The cache lies as cuDNN wants it, which reads no more of it than these
    positions; XLA reads all. `scale` and `implementation` are those of `row_attention`.
    """
    num_slots = len(q_SNH)
    if _choose(implementation, q_SNH[:, None]) == "cudnn":
        # A slice of the cache would be a copy: all slots take part, and the others have no tokens.
        others = len(k_RCKH) - num_slots
        q_R1NH = jnp.pad(q_SNH, ((0, others), (0, 0), (0, 0)))[:, None]
        lens_R = jnp.pad(lens_S, (0, others))
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
    sees = jnp.arange(k_RCKH.shape[1]) < lens_S[:, None]
    attended = jax.nn.dot_product_attention(
        q_SNH[:, None],
        k_RCKH[:num_slots],
        v_RCKH[:num_slots],
        mask=sees[:, None, None],
        scale=scale,
        implementation="xla",
    )
    return attended[:, 0]


def is_for_cudnn(platform: str, dtype: str, head_dim: int) -> bool:
    """Whether cuDNN's attention takes such heads."""
    return platform == "gpu" and dtype in ("bfloat16", "float16") and head_dim in range(8, 129, 8)


def _choose(implementation: Implementation, q_BTNH: jax.Array) -> Any:
    if implementation != "auto":
        return implementation
    device = jax.default_backend()
    if device == "tpu" and q_BTNH.shape[1] % 128 == 0 and q_BTNH.shape[3] % 128 == 0:
        return "splash"
    if is_for_cudnn(device, q_BTNH.dtype.name, q_BTNH.shape[3]):
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
