"""Storage layouts for the layer weights and the KV cache of a decoder.

Training and prefill always use `Stacked`. Decoding reads all weights and the filled part of the cache for every
token, so it uses the layout that the device reads fastest (`trapo_jax.sampling.programs.choose_layout`). The decoder
and the sampler depend only on the `StorageLayout` interface; to add a layout, write a class that implements it.
"""

from trapo_jax.models.kv_layouts.interface import (
    CONTRACTED_AXES,
    KVCache,
    StorageLayout,
    keep_operand_order,
)
from trapo_jax.models.kv_layouts.per_layer import PerLayer, PerLayerTransposed
from trapo_jax.models.kv_layouts.stacked import Stacked

__all__ = [
    "CONTRACTED_AXES",
    "KVCache",
    "PerLayer",
    "PerLayerTransposed",
    "Stacked",
    "StorageLayout",
    "keep_operand_order",
]
