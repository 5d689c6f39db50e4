"""One decoder for the Llama, Qwen, Mistral, and Gemma 3 families, with the KV cache as an explicit argument.

The same module runs whole rows (training) and new tokens with a cache (prefill, decoding). Outside this package, the
decoder's parameters are a plain nested dict, and the decoder is applied with a pure function::

    hidden, _ = apply_decoder(config, params, token_ids, positions, segment_ids)

Shape suffixes: B rows, T tokens, S slots, C cache positions, D model width, N heads, K key-value heads,
G = N / K, H head width, F MLP width, L layers, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from trapo_jax.models.attention import Implementation, row_attention
from trapo_jax.models.kv_layouts import (
    CONTRACTED_AXES,
    KVCache,
    Stacked,
    StorageLayout,
    keep_operand_order,
)
from trapo_jax.models.lora import A, B, Lora
from trapo_jax.models.rope import Angles, Rope, apply_rope, rope_angles
from trapo_jax.types import BATCH_AXES

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
# The attention of one layer: (q, k, v) -> (attended, entries for the cache).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and its compute options.

    Attributes:
      qkv_bias, output_bias: whether the attention projections have biases.
      qk_norm: whether every query and key head is RMS-normalized before the rotary embedding is applied.
      post_norms: whether the outputs of attention and MLP are also normalized, before the residual addition.
      norm_offset: offset added to the scale of every norm.
      embedding_scale: multiplier for token embeddings.
      attention_scale: multiplier for attention scores; `head_dim ** -0.5` if None.
      window: in a local layer, a token attends to itself and to the `window - 1` tokens before it.
      local_layers: whether each layer is local; if empty, no layer is local.
      local_rope: rotary embedding of local layers; the same as in the other layers if None.
      lora: adapters of the layers' matrices; no adapters if None.
      dtype: dtype of activations and matmul inputs. In float32, matmuls have full precision; by default, JAX would
        round their inputs to 10 bits on GPUs (TF32) and to 7 bits on TPUs (bfloat16).
      remat: what the backward pass recomputes: nothing ("none"), everything except the results of matmuls
        ("dots"), or everything except the inputs of the layers ("full").
      attention: see `row_attention`.
      layout: how the layers' weights and the KV cache are stored. Layouts other than `Stacked` are only for decoding.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    norm_epsilon: float
    tied_embeddings: bool
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    lora: Lora | None = None
    dtype: str = "float32"
    remat: Remat = "none"
    attention: Implementation = "auto"
    layout: StorageLayout = dataclasses.field(default_factory=Stacked)

    @property
    def has_windows(self) -> bool:
        return any(self.local_layers)


class Block(nnx.Module):
    """Attention and MLP, each preceded by an RMS norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        group = c.num_heads // c.num_kv_heads
        init = functools.partial(_normal, rngs, c.width)
        self.attention_norm = _norm_scale(c, c.width)
        # One matmul, which can be sharded over K, computes the G queries, key, and value of every key-value head.
        self.qkv = nnx.Param(init(c.width, c.num_kv_heads, group + 2, c.head_dim))
        if c.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((c.num_kv_heads, group + 2, c.head_dim)))
        if c.qk_norm:
            self.query_norm, self.key_norm = (_norm_scale(c, c.head_dim) for _ in range(2))
        self.output = nnx.Param(
            _normal(rngs, c.num_heads * c.head_dim, c.num_kv_heads, group, c.head_dim, c.width)
        )
        if c.output_bias:
            self.output_bias = nnx.Param(jnp.zeros(c.width))
        self.mlp_norm = _norm_scale(c, c.width)
        self.gate_up = nnx.Param(init(c.width, 2, c.mlp_width))
        self.down = nnx.Param(_normal(rngs, c.mlp_width, c.mlp_width, c.width))
        if c.lora:
            for name in c.lora.targets:
                self._add_adapter(name, c.lora.rank, rngs)
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = (
                _norm_scale(c, c.width) for _ in range(2)
            )

    def _add_adapter(self, name: str, rank: int, rngs: nnx.Rngs) -> None:
        shape = getattr(self, name).shape
        num_in = CONTRACTED_AXES[name]
        fan_in = math.prod(shape[:num_in])
        setattr(self, name + A, nnx.Param(_normal(rngs, fan_in, *shape[:num_in], rank)))
        setattr(self, name + B, nnx.Param(jnp.zeros((rank, *shape[num_in:]))))

    def __call__(self, x_BTD: jax.Array, angles: Angles, attend: Attend) -> tuple[jax.Array, Any]:
        """Returns the new residual stream, and the cache entries returned by `attend`."""
        attended, entries = self._attention(x_BTD, angles, attend)
        x_BTD += attended
        return x_BTD + self._mlp(x_BTD), entries

    def _attention(self, x_BTD, angles, attend):
        c = self.config
        dtype = x_BTD.dtype
        normed = self._norm(x_BTD, self.attention_norm)
        qkv = self._matmul(normed, "qkv")
        if c.qkv_bias:
            qkv += self.qkv_bias[...].astype(dtype)
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q_BTNH = q.reshape(*q.shape[:2], c.num_heads, c.head_dim)
        if c.qk_norm:
            q_BTNH, k = self._norm(q_BTNH, self.query_norm), self._norm(k, self.key_norm)
        attended, entries = attend(apply_rope(q_BTNH, angles), apply_rope(k, angles), v)
        attended = self._matmul(attended.reshape(*q.shape[:2], -1), "output")
        if c.output_bias:
            attended += self.output_bias[...].astype(dtype)
        if c.post_norms:
            attended = self._norm(attended, self.attention_post_norm)
        return attended, entries

    def _mlp(self, x_BTD):
        gate_up = self._matmul(self._norm(x_BTD, self.mlp_norm), "gate_up")
        activation = ACTIVATIONS[self.config.activation]
        hidden = activation(gate_up[..., 0, :]) * gate_up[..., 1, :]
        mlp = self._matmul(hidden, "down")
        return self._norm(mlp, self.mlp_post_norm) if self.config.post_norms else mlp

    def _matmul(self, x_BTI, name: str):
        """Multiplies by the named matrix and adds the output of its adapter, if any. Returns `[B, T, *out]`."""
        c = self.config
        weights = getattr(self, name)[...].astype(x_BTI.dtype)
        y = c.layout.matmul(x_BTI, weights, num_contracted=CONTRACTED_AXES[name])
        if c.lora is None or name not in c.lora.targets:
            return y
        a, b = (getattr(self, name + suffix)[...].astype(x_BTI.dtype) for suffix in (A, B))
        down = x_BTI @ a.reshape(x_BTI.shape[-1], -1)
        return y + c.lora.scale * jnp.tensordot(down, b, axes=1)

    def _norm(self, x, scale: nnx.Param):
        return rms_norm(x, scale[...] + self.config.norm_offset, self.config.norm_epsilon)


class Decoder(nnx.Module):
    """Maps token ids to final hidden states. Logits are computed by the losses and the sampler."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(_normal(rngs, config.width, config.vocab_size, config.width))
        init_layer = lambda rngs: Block(config, rngs=rngs)
        self.layers = config.layout.init_layers(init_layer, config.num_layers, rngs)
        self.final_norm = _norm_scale(config, config.width)
        if not config.tied_embeddings:
            self.unembedding = nnx.Param(
                _normal(rngs, config.width, config.width, config.vocab_size)
            )

    def __call__(
        self,
        token_ids_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        context_ids_BT: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        cached_lens_S: jax.Array | None = None,
        view_len: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the decoder on whole rows, or on T new tokens per slot with a cache.

        Args:
          token_ids_BT: int32. With a cache, `[S, T]`, the tokens that follow the cached tokens of each slot.
          positions_BT: int32, positions of the tokens in their texts.
          segment_ids_BT: int32; tokens attend only to tokens of their segment. Required without a cache.
          context_ids_BT: int32; tokens also attend to this segment. See `row_attention`; None with a cache.
          cache: a cache in `config.layout` with at least S rows; only the first S are used. It is not modified;
            store the new tokens with `StorageLayout.append`.
          cached_lens_S: int32, number of filled positions of each slot. If a slot's number is at least the length of
            the cache, the slot's result is finite but meaningless, and its token is not stored.
          view_len: upper bound on the number of filled positions; the length of the cache if None.

        Returns:
          The hidden states `[B, T, D]` after the final norm, in `config.dtype`, and the entries for
          `StorageLayout.append`. For `Stacked`, these are the new tokens' keys and values, each `[L, B, T, K, H]`.
        """
        c = self.config
        # The scale is rounded to the dtype, as in transformers.
        scale = jnp.asarray(c.embedding_scale, c.dtype)
        x_BTD = _shard_rows(self.embedding[...][token_ids_BT].astype(c.dtype) * scale)
        angles = rope_angles(positions_BT, c.rope, c.head_dim)
        local_angles = rope_angles(positions_BT, c.local_rope or c.rope, c.head_dim)
        is_mixed = len(set(c.local_layers)) > 1
        is_local_L = jnp.asarray(c.local_layers) if is_mixed else None

        def run_layer(x, block, layer_cache, is_local):
            if is_mixed:
                chosen = _choose(is_local, local_angles, angles)
            else:
                chosen = local_angles if c.has_windows else angles
            rows = (segment_ids_BT, context_ids_BT, positions_BT)
            attend = self._attend(
                rows, layer_cache, cached_lens_S, view_len=view_len, is_local=is_local
            )
            x, entries = block(x, chosen, attend)
            return _shard_rows(x), entries

        x_BTD, entries = c.layout.run_layers(
            _remat(run_layer, c.remat), x_BTD, self.layers, cache, is_local_L
        )
        return rms_norm(x_BTD, self.final_norm[...] + c.norm_offset, c.norm_epsilon), entries

    def _attend(self, rows, layer_cache, cached_lens_S, *, view_len, is_local) -> Attend:
        """Returns a layer's attention function: within whole rows, or from new tokens to the layer's cache."""
        c = self.config
        options: Any = {
            "scale": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            "window": c.window if c.has_windows else None,
            "is_local": is_local,
            "implementation": c.attention,
        }

        def within_rows(q_BTNH, k_BTKH, v_BTKH):
            segment_ids, context_ids, positions = rows
            attended = row_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_ids,
                context_ids_BT=context_ids,
                positions_BT=positions,
                **options,
            )
            return attended, (k_BTKH, v_BTKH)

        def to_cache(q_STNH, k_STKH, v_STKH):
            return c.layout.attend(
                q_STNH, k_STKH, v_STKH, layer_cache, cached_lens_S, view_len=view_len, **options
            )

        return within_rows if layer_cache is None else to_cache


def apply_decoder(config: DecoderConfig, params: Params, *args, **kwargs):
    """Applies a `Decoder` as a pure function of its parameters; see `Decoder.__call__` for the other arguments."""
    is_float32 = config.dtype == "float32"
    with jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext():
        return nnx.merge(_decoder_graph(config), params)(*args, **kwargs)


def abstract_params(config: DecoderConfig) -> Params:
    """Returns the shapes and dtypes of the parameters without allocating them."""
    return nnx.to_pure_dict(nnx.split(_abstract_decoder(config))[1])


def init_cache(config: DecoderConfig, num_rows: int, length: int) -> KVCache:
    """Returns an empty cache in `config.layout`, with `num_rows` rows of `length` positions."""
    c = config
    return c.layout.init(c.num_layers, num_rows, length, c.num_kv_heads, c.head_dim, c.dtype)


def unembedding(params: Params) -> jax.Array:
    """Returns the output projection `[D, V]`, which is the transposed embedding if the embeddings are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def output_projection(config: DecoderConfig, params: Params) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from hidden states `[S, D]` to float32 logits `[V, S]`, for use in loops.

    The weights are cast once, outside the loop, and multiplied in their storage order. With the operands swapped, the
    product would take up to 1.5 times as long on a CPU, or tied weights would be copied and transposed before the loop.
    """
    precision = "highest" if config.dtype == "float32" else None
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32, precision=precision)
    if "unembedding" in params:
        weights_DV = params["unembedding"].astype(config.dtype)
        return lambda hidden_SD: keep_operand_order(matmul(hidden_SD, weights_DV)).T
    weights_VD = params["embedding"].astype(config.dtype)
    return lambda hidden_SD: keep_operand_order(matmul(weights_VD, hidden_SD.T))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Normalizes the last axis by its root mean square, in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


def _shard_rows(x_BTD: jax.Array) -> jax.Array:
    """If a mesh is set, shards rows over its batch axes, so that weights rather than activations are gathered."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, P(BATCH_AXES, None, None))


def _choose(condition: jax.Array, if_true: Angles, if_false: Angles) -> Angles:
    return jax.tree.map(functools.partial(jnp.where, condition), if_true, if_false)


def _remat(layer: Callable, name: Remat) -> Callable:
    if name == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    return nnx.remat(layer, prevent_cse=False, policy=policy)


def _norm_scale(config: DecoderConfig, size: int) -> nnx.Param:
    return nnx.Param(jnp.full(size, 1.0 - config.norm_offset))


@functools.cache
def _decoder_graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.split(_abstract_decoder(config))[0]


def _abstract_decoder(config: DecoderConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _normal(rngs: nnx.Rngs, fan_in: int, *shape: int) -> jax.Array:
    return fan_in**-0.5 * jax.random.normal(rngs.params(), shape)
