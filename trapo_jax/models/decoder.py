"""One decoder for the Llama, Qwen, Mistral and Gemma 3 families: stacked layers under `nnx.scan`, the KV
cache an explicit argument.

The same module runs whole rows (training) and new tokens against a cache (prefill, decoding). Outside
this package its parameters are a plain nested dict and the call is a pure function::

    hidden, _ = apply_decoder(config, params, token_ids, positions, segment_ids)

Shape suffixes: B rows, T tokens, S slots, C cache positions, D model width, N heads, K key-value heads,
G = N / K, H head width, F MLP width, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from trapo_jax.models.attention import (
    Implementation,
    cached_attention,
    row_attention,
    slots_attention,
)
from trapo_jax.models.lora import A, B, Lora
from trapo_jax.models.rope import Angles, Rope, apply_rope, rope_angles
from trapo_jax.types import BATCH_AXES

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
Layers = Literal["stacked", "apart", "turned"]

MATRICES = ("qkv", "output", "gate_up", "down")  # of a layer
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and how it is computed.

    Attributes:
      qkv_bias, output_bias: biases of the attention's projections.
      qk_norm: RMS norms of every query and key head, before the rotation.
      post_norms: also norms behind attention and MLP, before they are added to the stream.
      norm_offset: added to every norm's scale.
      embedding_scale: factor of the embedded tokens.
      attention_scale: factor of the scores; None for `head_dim ** -0.5`.
      window: a token of a local layer sees itself and the `window - 1` before it.
      local_layers: which layers are local, one entry each; empty for none.
      local_rope: of local layers; None for the same as the others.
      lora: adapters of the layers' matrices; None for none.
      dtype: of activations and matmul inputs. Those in float32 are multiplied in float32: left to itself JAX would
        round them, on GPUs to 10 bits (TF32), on TPUs to 7 (bfloat16).
      remat: what the backward pass computes anew: nothing, all but the results of matmuls
        ("dots"), or all but the layers' inputs ("full").
      attention: see `row_attention`.
      layers: how parameters and cache lie: all layers in one array under a loop; or an array for each, as
        `lay_apart` makes them, and the same with the matrices turned round. These two are for decoding, a token a
        slot: it is written to the cache, and then attends to what is there. Layers apart have no windows.
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
    layers: Layers = "stacked"


class KVCache(NamedTuple):
    """Keys and values of all layers, or in their place their shardings.

    They lie as `cached_attention` wants them, where the layers are turned as a list. Of layers apart they are a list
    too, but of `[S, C, K, H]` both, as `slots_attention` wants them.
    """

    keys: Any  # [L, S, K, H, C]
    values: Any  # [L, S, K, C, H]


class Block(nnx.Module):
    """Attention and MLP, each behind an RMS norm, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = c
        group = c.num_heads // c.num_kv_heads
        init = functools.partial(_normal, rngs, c.width)
        self.attention_norm = _norm_scale(c, c.width)
        # Per key-value head: its G query heads, its key, its value. One matmul, shardable over K.
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
        num_in = _num_in(name)
        fan_in = math.prod(shape[:num_in])
        setattr(self, name + A, nnx.Param(_normal(rngs, fan_in, *shape[:num_in], rank)))
        setattr(self, name + B, nnx.Param(jnp.zeros((rank, *shape[num_in:]))))

    def __call__(self, x_BTD, angles, segment_ids_BT, cache, cached_lens_S, is_local):
        """Returns the new residual stream and the new tokens' (keys, values), each `[B, T, K, H]`; or of layers that
        are not stacked the cache that holds them."""
        attended, new_entries = self._attend(
            x_BTD, angles, segment_ids_BT, cache, cached_lens_S, is_local
        )
        x_BTD += attended
        return x_BTD + self._mlp(x_BTD), new_entries

    def _attend(self, x_BTD, angles, segment_ids_BT, cache, cached_lens_S, is_local):
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
        q_BTNH, k = apply_rope(q_BTNH, angles), apply_rope(k, angles)
        options: Any = {
            "scale": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            "window": c.window if any(c.local_layers) else None,
            "is_local": is_local,
        }
        new_entries = k, v
        if cache is None:
            attended = row_attention(
                q_BTNH, k, v, segment_ids_BT, implementation=c.attention, **options
            )
        elif c.layers == "stacked":
            attended = cached_attention(
                q_BTNH, new_entries, cache.keys, cache.values, cached_lens_S, **options
            )
        else:
            keys, values = new_entries = _with_token(c, cache, k[:, 0], v[:, 0], cached_lens_S)
            is_kept = cached_lens_S < values.shape[-2 if c.layers == "turned" else 1]
            lens_S = jnp.where(is_kept, cached_lens_S, 0)
            if c.layers == "turned":
                attended = cached_attention(q_BTNH, None, keys, values, lens_S, **options)
            else:
                attended = slots_attention(
                    q_BTNH[:, 0],
                    keys,
                    values,
                    lens_S + 1,
                    scale=options["scale"],
                    implementation=c.attention,
                )
        attended = self._matmul(attended.reshape(*q.shape[:2], -1), "output")
        if c.output_bias:
            attended += self.output_bias[...].astype(dtype)
        if c.post_norms:
            attended = self._norm(attended, self.attention_post_norm)
        return attended, new_entries

    def _mlp(self, x_BTD):
        gate_up = self._matmul(self._norm(x_BTD, self.mlp_norm), "gate_up")
        activation = ACTIVATIONS[self.config.activation]
        hidden = activation(gate_up[..., 0, :]) * gate_up[..., 1, :]
        mlp = self._matmul(hidden, "down")
        return self._norm(mlp, self.mlp_post_norm) if self.config.post_norms else mlp

    def _matmul(self, x, name: str):
        """x `[B, T, in]` times the matrix of this name, and what its adapter adds: `[B, T, *out]`."""
        weights = getattr(self, name)[...].astype(x.dtype)
        if self.config.layers == "turned":
            y = _as_written(jnp.tensordot(weights, x, axes=(-1, -1)))
            y = jnp.moveaxis(y, (-2, -1), (0, 1))
        else:
            # With three contracted axes, those of the output, XLA would transpose the weights on the way.
            out = weights.shape[_num_in(name) :]
            y = jnp.tensordot(x, weights.reshape(x.shape[-1], *out), axes=1)
        lora = self.config.lora
        if lora is None or name not in lora.targets:
            return y
        a, b = (getattr(self, name + suffix)[...].astype(x.dtype) for suffix in (A, B))
        return y + lora.scale * jnp.tensordot(x @ a.reshape(x.shape[-1], -1), b, axes=1)

    def _norm(self, x, scale: nnx.Param):
        return rms_norm(x, scale[...] + self.config.norm_offset, self.config.norm_epsilon)


class Decoder(nnx.Module):
    """Token ids to final hidden states; the projection to logits belongs to the losses."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_blocks(rngs):
            return Block(config, rngs=rngs)

        self.embedding = nnx.Param(_normal(rngs, config.width, config.vocab_size, config.width))
        if config.layers != "stacked":
            self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.num_layers))
        else:
            self.layers = stacked_blocks(rngs)
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
        *,
        cache: KVCache | None = None,
        cached_lens_S: jax.Array | None = None,
        view_len: int | None = None,
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        """Runs whole rows, or T new tokens a slot against a cache.

        Args:
          token_ids_BT: int32; with a cache `[S, T]`, what follows each slot's cached tokens.
          positions_BT: int32, 0 at the first token of a segment.
          segment_ids_BT: int32; tokens attend within their segment. Needed without a cache.
          cache: of stacked layers read, never written: the caller puts the new entries where it wants them. Of
            others it gets a token a slot. Of more slots than S, its first S are meant.
          cached_lens_S: int32, valid cache positions of each slot. Of a slot where it is beyond the cache the results
            are finite and mean nothing, and with layers that are not stacked its token is not kept.
          view_len: look at so many positions of the cache of stacked layers; None for all.

        Returns:
          hidden `[B, T, D]` after the final norm, in `config.dtype`; and the new tokens' keys and
          values, each `[L, B, T, K, H]`, or of layers that are not stacked the cache with them.
        """
        c = self.config
        # The scale is rounded to the dtype, as where these weights come from.
        scale = jnp.asarray(c.embedding_scale, c.dtype)
        x_BTD = _split_rows(self.embedding[...][token_ids_BT].astype(c.dtype) * scale)
        angles = rope_angles(positions_BT, c.rope, c.head_dim)
        local_angles = rope_angles(positions_BT, c.local_rope or c.rope, c.head_dim)
        is_mixed = len(set(c.local_layers)) > 1
        is_local_L = jnp.asarray(c.local_layers) if is_mixed else None

        def one_layer(x, block, layer_cache, is_local):
            if layer_cache is not None and c.layers == "stacked":
                # Sliced here, a layer at a time: nothing is copied twice.
                keys, values = (x[: len(token_ids_BT)] for x in layer_cache)
                layer_cache = KVCache(keys[..., :view_len], values[..., :view_len, :])
            if is_mixed:
                chosen = _choose(is_local, local_angles, angles)
            else:
                chosen = local_angles if any(c.local_layers) else angles
            x, new_entries = block(x, chosen, segment_ids_BT, layer_cache, cached_lens_S, is_local)
            return _split_rows(x), new_entries

        if c.layers != "stacked":
            entries = []
            for i, block in enumerate(cast(nnx.List, self.layers)):
                layer_cache = None if cache is None else KVCache(cache.keys[i], cache.values[i])
                is_local = None if is_local_L is None else is_local_L[i]
                x_BTD, new = one_layer(x_BTD, block, layer_cache, is_local)
                entries.append(new)
            new_entries = KVCache(*map(list, zip(*entries, strict=True)))
        else:
            run_layers = nnx.scan(
                _remat(one_layer, c.remat),
                in_axes=(nnx.Carry, 0, 0, 0),
                out_axes=(nnx.Carry, 0),
            )
            x_BTD, new_entries = run_layers(x_BTD, self.layers, cache, is_local_L)
        return rms_norm(x_BTD, self.final_norm[...] + c.norm_offset, c.norm_epsilon), new_entries


def apply_decoder(config: DecoderConfig, params: Params, *args, **kwargs):
    """`Decoder.__call__` as a pure function of the parameters; same arguments and results."""
    is_float32 = config.dtype == "float32"
    with jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext():
        return nnx.merge(_decoder_graph(config), params)(*args, **kwargs)


def abstract_params(config: DecoderConfig) -> Params:
    """The parameters' shapes and dtypes, without memory."""
    return nnx.to_pure_dict(nnx.split(_abstract_decoder(config))[1])


def lay_apart(layers: Params, *, turned: bool) -> dict[int, Params]:
    """`params["layers"]` with an array for each layer, for `DecoderConfig.layers`; `turned`, matrices as `[*out, in]`.

    For decoding on CPUs and GPUs, where XLA copies a layer out of a stack before it multiplies. A CPU multiplies few
    rows of activations up to twice as fast on the right of the weights as on their left.
    """

    def of_layer(path, x, i):
        name = path[-1].key
        if not turned or name not in MATRICES:
            return x[i]
        return jnp.moveaxis(x[i].reshape(-1, *x.shape[1 + _num_in(name) :]), 0, -1)

    layer = lambda i: jax.tree_util.tree_map_with_path(lambda p, x: of_layer(p, x, i), layers)
    return {i: layer(i) for i in range(len(layers["attention_norm"]))}


def unembedding(params: Params) -> jax.Array:
    """`[D, V]`: the output projection, or the transposed embedding where they are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def output_projection(config: DecoderConfig, params: Params) -> Callable[[jax.Array], jax.Array]:
    """From hidden states `[S, D]` to float32 logits `[V, S]`, for loops: the weights are cast here, once.

    They are multiplied as they lie: turned round, the product takes up to half as long again on a CPU, or tied
    weights' transpose is copied before the loop.
    """
    precision = "highest" if config.dtype == "float32" else None
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32, precision=precision)
    if "unembedding" in params:
        weights_DV = params["unembedding"].astype(config.dtype)
        return lambda hidden_SD: _as_written(matmul(hidden_SD, weights_DV)).T
    weights_VD = params["embedding"].astype(config.dtype)
    return lambda hidden_SD: _as_written(matmul(weights_VD, hidden_SD.T))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


def _with_token(c: DecoderConfig, cache: KVCache, k_SKH, v_SKH, where_S) -> KVCache:
    """The cache of a layer that is not stacked, with a token a slot; where it would lie beyond, without."""
    slots = jnp.arange(len(where_S))
    if c.layers == "turned":
        return KVCache(
            cache.keys.at[slots, :, :, where_S].set(k_SKH, mode="drop"),
            cache.values.at[slots, :, where_S].set(v_SKH, mode="drop"),
        )
    put = lambda old, new: old.at[slots, where_S].set(new, mode="drop")
    return KVCache(put(cache.keys, k_SKH), put(cache.values, v_SKH))


def _as_written(product: jax.Array) -> jax.Array:
    """A product whose operands XLA does not change round."""
    return jax.lax.optimization_barrier(product)


def _num_in(name: str) -> int:
    """How many axes of a layer's matrix, its first, are contracted."""
    return 3 if name == "output" else 1


def _split_rows(x_BTD: jax.Array) -> jax.Array:
    """Where a mesh is set: rows over its batch axes, so that weights travel, not activations."""
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
