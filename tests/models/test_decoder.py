"""Tests that the decoder's logits equal those of transformers for every architecture, with and without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.commands import TINY_MODEL
from support.transformers_models import make_theirs, needs_torch, their_logits
from trapo_jax.models import (
    ARCHITECTURES,
    KVCache,
    PerLayer,
    PerLayerTransposed,
    apply_decoder,
    init_cache,
    init_params,
    load_params,
    read_config,
    unembedding,
)
from trapo_jax.models.attention import row_attention

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# The transformers model_type of each case, and the config fields that differ from `transformers_models.SMALL`.
CASES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama with tied embeddings and a separate head size": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama 3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "llama 3 rope, original length outside rope_scaling": (
        "llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    ),
    "llama linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    ),
    "gemma3, every layer local": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3},
    ),
}


class Ours:
    """The model in a folder, evaluated with our decoder."""

    def __init__(self, folder):
        self.config = read_config(folder)
        self.params = load_params(folder, self.config)
        self._rows = jax.jit(
            lambda params, *rows: apply_decoder(self.config, params, *rows)[0] @ unembedding(params)
        )

    def logits(self, token_ids, segment_ids=None, positions=None):
        if positions is None:
            positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
        segment_ids = np.ones_like(token_ids) if segment_ids is None else segment_ids
        return np.asarray(self._rows(self.params, token_ids, positions, segment_ids))

    def logits_by_token(self, token_ids, layout):
        """Computes logits token by token, with the parameters and the cache in the given storage layout."""
        config = dataclasses.replace(self.config, layout=layout)
        layers = layout.convert_weights(self.params["layers"])
        num_rows, length = token_ids.shape
        num_slots = num_rows + layout.reads_filled_only  # one unused slot
        cache = jax.tree.map(lambda x: x + 7.0, init_cache(config, num_slots, length + 3))

        def step(cache, column):
            t, ids = column
            position = jnp.full(num_rows, t)
            hidden, cache = apply_decoder(
                config,
                {**self.params, "layers": layers},
                ids[:, None],
                position[:, None],
                cache=cache,
                cached_lens_S=position,
            )
            return cache, hidden[:, 0] @ unembedding(self.params)

        columns = (jnp.arange(length), jnp.asarray(token_ids.T))
        return jax.lax.scan(step, cache, columns)[1].swapaxes(0, 1)

    def decoded_logits(self, token_ids):
        """Computes logits for three tokens at once, then for four, and then token by token, as an engine does.

        The cache is longer than the row, and its unfilled positions must not affect the result.
        """
        config, (num_rows, length) = self.config, token_ids.shape
        shape = (config.num_layers, num_rows, config.num_kv_heads)
        cache = KVCache(
            jnp.full((*shape, config.head_dim, length + 3), 7.0),
            jnp.full((*shape, length + 3, config.head_dim), 7.0),
        )
        logits = []
        for start, end in ((0, 3), (3, 7)):
            cache, new = self._extend(cache, start, jnp.asarray(token_ids[:, start:end]))
            logits.append(new)

        def step(cache, column):
            t, ids = column
            return self._extend(cache, t, ids[:, None])

        columns = (jnp.arange(7, length), jnp.asarray(token_ids[:, 7:].T))
        one_by_one = jax.lax.scan(step, cache, columns)[1][:, :, 0].swapaxes(0, 1)
        return np.concatenate([*logits, one_by_one], axis=1)

    def _extend(self, cache, start, token_ids):
        """Appends tokens at position `start`. Returns the new cache and the logits of these tokens."""
        num_rows, count = token_ids.shape
        positions = start + jnp.arange(count)
        hidden, (keys, values) = apply_decoder(
            self.config,
            self.params,
            token_ids,
            jnp.broadcast_to(positions, token_ids.shape),
            cache=cache,
            cached_lens_S=jnp.full(num_rows, start),
        )
        cache = KVCache(
            cache.keys.at[..., positions].set(keys.transpose(0, 1, 3, 4, 2)),
            cache.values.at[..., positions, :].set(values.swapaxes(2, 3)),
        )
        return cache, hidden @ unembedding(self.params)


def test_every_architecture_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    theirs = make_theirs(*CASES[case], tmp_path)
    ours = Ours(tmp_path)
    token_ids = np.random.default_rng(0).integers(0, 50, (3, 40))
    whole = their_logits(theirs, token_ids)
    np.testing.assert_allclose(ours.logits(token_ids), whole, atol=1e-4)
    np.testing.assert_allclose(ours.decoded_logits(token_ids), whole, atol=1e-4)
    has_windows = any(ours.config.local_layers)
    for layout in (PerLayerTransposed(),) if has_windows else (PerLayerTransposed(), PerLayer()):
        np.testing.assert_allclose(ours.logits_by_token(token_ids, layout), whole, atol=1e-4)

    valid = np.arange(40) < np.array([40, 17, 1])[:, None]
    padded = their_logits(theirs, token_ids, valid.astype(np.int64))
    logits = ours.logits(token_ids, valid.astype(token_ids.dtype))
    np.testing.assert_allclose(logits[valid], padded[valid], atol=1e-4)

    segments = np.tile([1] * 11 + [2] * 25 + [0] * 4, (3, 1))
    positions = np.tile([*range(11), *range(25), *[0] * 4], (3, 1))
    packed = ours.logits(token_ids, segments, positions)
    for part in (slice(0, 11), slice(11, 36)):
        alone = their_logits(theirs, token_ids[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-4)
    assert np.isfinite(packed).all()


@pytest.mark.slow
def test_logits_of_the_tiny_model_equal_transformers():
    torch = needs_torch()
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    token_ids = np.random.default_rng(0).integers(0, 30, (3, 17))
    np.testing.assert_allclose(
        Ours(TINY_MODEL).logits(token_ids), their_logits(theirs, token_ids), atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_saves_memory_and_keeps_the_gradient(remat):
    token_ids = np.random.default_rng(0).integers(3, 30, (4, 64))
    positions = np.broadcast_to(np.arange(64), token_ids.shape)

    def gradient(remat):
        config = read_config(TINY_MODEL, remat=remat)

        def loss(params):
            hidden, _ = apply_decoder(config, params, token_ids, positions, np.ones_like(token_ids))
            return jnp.sum(jnp.sin(hidden))

        params = init_params(config, seed=0)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    plain, plain_bytes = gradient("none")
    again, again_bytes = gradient(remat)
    assert again_bytes < 0.8 * plain_bytes
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("is_local", [None, True, False])
def test_splash_attention_equals_plain_attention(window, is_local):
    """Compares values and gradients in interpret mode, with grouped-query heads and rows that are packed and padded."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 256, 4, 128))
    k, v = (jax.random.normal(key, (2, 256, 2, 128)) for key in keys[1:])
    segments = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256], jnp.int32)

    def attend(implementation):
        def loss(q, k, v):
            out = row_attention(
                q,
                k,
                v,
                segments,
                scale=0.1,
                window=window,
                is_local=None if is_local is None else jnp.array(is_local),
                implementation=implementation,
            )
            out = jnp.where(segments[..., None, None] > 0, out, 0)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return (out, *gradients)

    for ours, plain in zip(attend("splash_interpreted"), attend("xla"), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-4)
