"""Low-rank adapters (LoRA, arXiv 2106.09685): a matrix W that is kept computes `x W + alpha / rank x A B`.

A `[in, rank]` begins normal, B `[rank, out]` zero: a run begins with the model as it is. Where a tree of parameters
holds adapters, they alone are trained.
"""

import dataclasses
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SUFFIXES = A, B = "_lora_a", "_lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which of a layer's matrices have an adapter: `targets` among qkv, output, gate_up and down."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def split_trained(params: Any) -> tuple[Any, Any]:
    """What is trained and what is kept, two trees: the adapters and the rest, or everything and nothing."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1].endswith(SUFFIXES)}
    if not adapters:
        return params, {}
    kept = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(adapters), unflatten_dict(kept)


def join_trained(trained: Any, kept: Any) -> Any:
    """The whole tree of `split_trained`."""
    return unflatten_dict({**flatten_dict(kept), **flatten_dict(trained)})


def merged(weights: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The matrices `[L, *in, *out]` that compute what `weights` and its adapters `[L, *in, r]`, `[L, r, *out]` do."""
    num_layers, rank = b.shape[:2]
    product = a.reshape(num_layers, -1, rank) @ b.reshape(num_layers, rank, -1)
    return weights + scale * product.reshape(weights.shape)
