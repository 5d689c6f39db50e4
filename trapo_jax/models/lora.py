"""Low-rank adapters (LoRA, arXiv 2106.09685): the frozen matrix W becomes `W + alpha / rank * A B`.

A `[in, rank]` is initialized with Gaussian noise and B `[rank, out]` with zeros, so that training starts from the
original model. If a parameter tree contains adapters, only the adapters are trained.
"""

import dataclasses
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SUFFIXES = A, B = "_lora_a", "_lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a decoder.

    Attributes:
      rank: the inner dimension of an adapter.
      alpha: adapters are scaled by `alpha / rank`.
      targets: the matrices of a layer that have an adapter: any of qkv, output, gate_up, and down.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def split_trained(params: Any) -> tuple[Any, Any]:
    """Splits parameters into trained and frozen ones.

    Returns:
      Two trees: the adapters and all other parameters; if there are no adapters, all parameters and an empty tree.
    """
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1].endswith(SUFFIXES)}
    if not adapters:
        return params, {}
    kept = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(adapters), unflatten_dict(kept)


def join_trained(trained: Any, kept: Any) -> Any:
    """Joins the two trees that `split_trained` returns."""
    return unflatten_dict({**flatten_dict(kept), **flatten_dict(trained)})


def merged(weights: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Merges adapters into the matrices that they adapt.

    Args:
      weights: `[L, *in, *out]`, the matrix of each layer.
      a: `[L, *in, rank]`.
      b: `[L, rank, *out]`.
      scale: see `Lora.scale`.

    Returns:
      `weights + scale * a b`.
    """
    num_layers, rank = b.shape[:2]
    product = a.reshape(num_layers, -1, rank) @ b.reshape(num_layers, rank, -1)
    return weights + scale * product.reshape(weights.shape)
