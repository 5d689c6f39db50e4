"""Computes the FLOPs of a decoder by formula.

A forward pass takes 2 N FLOPs per token, plus 4 * layers * heads * head_dim attention FLOPs for every pair (token,
attended token). N is the number of parameters in matrix multiplications. It excludes the input embedding, which is a
lookup, unless the embedding is tied to the output projection. An update takes three times as many FLOPs, or twice as
many for parameters that are not trained and therefore have no gradient. The following are ignored: rematerialization,
padding, sliding windows (keys outside the window are counted as attended), and the attention of interrupted completions
that are prefilled again.
"""

import dataclasses
import math
from typing import Any

import jax

from trapo_jax.models.decoder import DecoderConfig, abstract_params
from trapo_jax.models.lora import split_trained


@dataclasses.dataclass(frozen=True)
class TokenCost:
    """FLOPs of a model per token and per pair (token, attended token).

    Attributes:
      num_params: number of parameters in matrix multiplications.
      num_trained: number of these parameters that are trained.
      per_pair: attention FLOPs per pair (token, attended token): 4 * layers * heads * head_dim.
    """

    num_params: int
    num_trained: int
    per_pair: int

    def forward(self, num_tokens: int, num_pairs: int) -> float:
        """Returns the FLOPs of a forward pass."""
        return float(2 * self.num_params * num_tokens + self.per_pair * num_pairs)

    def update(self, num_tokens: int, num_pairs: int) -> float:
        """Returns the FLOPs of a forward pass and of computing the gradients of activations and trained parameters."""
        products = 2 * self.num_params + self.num_trained
        return float(2 * products * num_tokens + 3 * self.per_pair * num_pairs)


def token_cost(decoder: DecoderConfig) -> TokenCost:
    """Returns the FLOPs of a decoder per token and per pair (token, attended token)."""
    params = abstract_params(decoder)
    return TokenCost(
        num_params=_count_multiplied(params, decoder),
        num_trained=_count_multiplied(split_trained(params)[0], decoder),
        per_pair=4 * decoder.num_layers * decoder.num_heads * decoder.head_dim,
    )


def count_attention_pairs(length: int) -> int:
    """Returns the number of pairs (token, attended token) in a causal sequence, including each token with itself."""
    return length * (length + 1) // 2


def _count_multiplied(params: Any, decoder: DecoderConfig) -> int:
    shapes = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(
        math.prod(x.shape)
        for path, x in shapes
        if path[-1].key != "embedding" or decoder.tied_embeddings
    )
