"""Tests the choice of the storage layout for decoding."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np

from trapo_jax.models import PerLayer, PerLayerTransposed, Stacked
from trapo_jax.sampling.programs import choose_layout


def test_a_cpu_decodes_large_layers_with_transposed_weights(decoder, monkeypatch):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tp",))
    assert choose_layout(decoder, mesh) == Stacked()
    monkeypatch.setattr("trapo_jax.sampling.programs.MIN_TRANSPOSED_LAYER_BYTES", 2**18)
    assert choose_layout(decoder, mesh) == PerLayerTransposed()


def test_a_gpu_decodes_with_one_cache_per_layer_where_cudnn_supports_it(decoder):
    device = types.SimpleNamespace(platform="gpu")
    mesh: Any = types.SimpleNamespace(devices=np.array([device]), size=1)
    half = dataclasses.replace(decoder, dtype="bfloat16")
    assert choose_layout(half, mesh) == PerLayer()
    assert choose_layout(decoder, mesh) == Stacked()
    for other in ({"attention": "xla"}, {"head_dim": 256}, {"window": 8, "local_layers": (True,)}):
        assert choose_layout(dataclasses.replace(half, **other), mesh) == Stacked()
