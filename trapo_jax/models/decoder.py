"""The decoder: Llama-shaped, stacked layers under `nnx.scan`, the KV cache an explicit argument.

The same module runs whole rows (training, prefill) and single tokens against a cache (decoding). Outside
this package its parameters are a plain nested dict and the call is a pure function::

    hidden, _ = apply_decoder(config, params, token_ids, positions, segment_ids)

Shape suffixes: B rows, T tokens, S slots, C cache positions, D model width, N heads, K key-value heads,
G = N / K, H head width, F MLP width, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trapo_jax.models.attention import row_attention, token_attention

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; `dtype` is that of activations and matmul inputs."""

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    dtype: str = "float32"


class KVCache(NamedTuple):
    """Keys and values of all layers, laid out for `token_attention`."""

    keys: jax.Array  # [L, S, K, H, C]
    values: jax.Array  # [L, S, K, C, H]


class Block(nnx.Module):
    """Attention and MLP, each behind an RMS norm, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        group = c.num_heads // c.num_kv_heads
        init = functools.partial(_normal, rngs, c.width)
        self.attention_norm = nnx.Param(jnp.ones(c.width))
        # Per key-value head: its G query heads, its key, its value. One matmul, shardable over K.
        self.qkv = nnx.Param(init(c.width, c.num_kv_heads, group + 2, c.head_dim))
        self.output = nnx.Param(
            _normal(rngs, c.num_heads * c.head_dim, c.num_kv_heads, group, c.head_dim, c.width)
        )
        self.mlp_norm = nnx.Param(jnp.ones(c.width))
        self.gate_up = nnx.Param(init(c.width, 2, c.mlp_width))
        self.down = nnx.Param(_normal(rngs, c.mlp_width, c.mlp_width, c.width))

    def __call__(self, x_BTD, rope, segment_ids_BT, cache, cached_lens_S):
        """Returns the new residual stream and the new tokens' (keys, values), each `[B, T, K, H]`."""
        c = self.config
        dtype = x_BTD.dtype
        normed = rms_norm(x_BTD, self.attention_norm[...], c.norm_epsilon)
        qkv = jnp.einsum("BTD,DKJH->BTKJH", normed, self.qkv[...].astype(dtype))
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q_BTNH = apply_rope(q.reshape(*q.shape[:2], c.num_heads, c.head_dim), rope)
        k = apply_rope(k, rope)
        if cache is None:
            attended = row_attention(q_BTNH, k, v, segment_ids_BT)
        else:
            attended = token_attention(
                q_BTNH[:, 0], k[:, 0], v[:, 0], cache.keys, cache.values, cached_lens_S
            )[:, None]
        attended = attended.reshape(*q.shape)
        x_BTD += jnp.einsum("BTKGH,KGHD->BTD", attended, self.output[...].astype(dtype))
        normed = rms_norm(x_BTD, self.mlp_norm[...], c.norm_epsilon)
        gate_up = jnp.einsum("BTD,DJF->BTJF", normed, self.gate_up[...].astype(dtype))
        mlp = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return x_BTD + mlp @ self.down[...].astype(dtype), (k, v)


class Decoder(nnx.Module):
    """Token ids to final hidden states; the projection to logits belongs to the losses."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_blocks(rngs):
            return Block(config, rngs=rngs)

        self.embedding = nnx.Param(_normal(rngs, config.width, config.vocab_size, config.width))
        self.layers = stacked_blocks(rngs)
        self.final_norm = nnx.Param(jnp.ones(config.width))
        if not config.tied_embeddings:
            self.unembedding = nnx.Param(
                _normal(rngs, config.width, config.width, config.vocab_size)
            )

    def __call__(
        self,
        token_ids_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        cached_lens_S: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Runs whole rows, or one token a slot against a cache.

        Args:
          token_ids_BT: int32; `[S, 1]` with a cache.
          positions_BT: int32, 0 at the first token of a segment.
          segment_ids_BT: int32; tokens attend within their segment. Needed without a cache.
          cache: read, never written: the caller puts the new entries where it wants them.
          cached_lens_S: int32, valid cache positions of each slot.

        Returns:
          hidden `[B, T, D]` after the final norm, in `config.dtype`; and the new tokens' keys and
          values, each `[L, B, T, K, H]`.
        """
        config = self.config
        x_BTD = self.embedding[...][token_ids_BT].astype(config.dtype)
        rope = rope_angles(positions_BT, config)

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        def run_layers(x, block, layer_cache):
            return block(x, rope, segment_ids_BT, layer_cache, cached_lens_S)

        x_BTD, new_entries = run_layers(x_BTD, self.layers, cache)
        return rms_norm(x_BTD, self.final_norm[...], config.norm_epsilon), new_entries


def apply_decoder(config: DecoderConfig, params: Params, *args, **kwargs):
    """`Decoder.__call__` as a pure function of the parameters; same arguments and results."""
    return nnx.merge(_decoder_graph(config), params)(*args, **kwargs)


def abstract_params(config: DecoderConfig) -> Params:
    """The parameters' shapes and dtypes, without memory."""
    return nnx.to_pure_dict(nnx.split(_abstract_decoder(config))[1])


def unembedding(params: Params) -> jax.Array:
    """`[D, V]`: the output projection, or the transposed embedding where they are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


def rope_angles(positions_BT: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, 1, H / 2]` in float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions_BT[..., None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (h, h + H / 2), as the Hugging Face checkpoints expect."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


@functools.cache
def _decoder_graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.split(_abstract_decoder(config))[0]


def _abstract_decoder(config: DecoderConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _normal(rngs: nnx.Rngs, fan_in: int, *shape: int) -> jax.Array:
    return fan_in**-0.5 * jax.random.normal(rngs.params(), shape)
