"""FLOPs of a decoder, counted by formula.

A forward pass takes 2 N FLOPs per token, where N is the number of parameters that a token is multiplied with (all
but an input embedding, which is a lookup, unless it is tied to the output), and 4 * layers * heads * head_dim FLOPs
of attention for every pair of a token and a token that it attends to. An update takes three times as much; twice for
parameters that are not trained, which have no gradient. Not counted are: recomputation that saves memory, padding,
keys outside a sliding window, and the attention of an interrupted completion that is prefilled again.
"""

import dataclasses
import math
from typing import Any

import jax

from trapo_jax.models.decoder import DecoderConfig, abstract_params
from trapo_jax.models.lora import split_trained


@dataclasses.dataclass(frozen=True)
class TokenCost:
    """FLOPs of a model per token and per pair of tokens.

    Attributes:
      num_params: number of parameters that a token is multiplied with.
      num_trained: number of those that are trained.
      per_pair: attention FLOPs of a token and a token that it attends to: 4 * layers * heads * head_dim.
    """

    num_params: int
    num_trained: int
    per_pair: int

    def forward(self, num_tokens: int, num_pairs: int) -> float:
        """Returns the FLOPs of a forward pass."""
        return float(2 * self.num_params * num_tokens + self.per_pair * num_pairs)

    def update(self, num_tokens: int, num_pairs: int) -> float:
        """Returns the FLOPs of a forward pass and the gradients of activations and trained parameters."""
        products = 2 * self.num_params + self.num_trained
        return float(2 * products * num_tokens + 3 * self.per_pair * num_pairs)


def token_cost(decoder: DecoderConfig) -> TokenCost:
    """Returns the cost of a decoder."""
    params = abstract_params(decoder)
    return TokenCost(
        num_params=_count_multiplied(params, decoder),
        num_trained=_count_multiplied(split_trained(params)[0], decoder),
        per_pair=4 * decoder.num_layers * decoder.num_heads * decoder.head_dim,
    )


def count_attention_pairs(length: int) -> int:
    """Returns the number of pairs (token, token that it attends to) in a causal sequence, itself included."""
    return length * (length + 1) // 2


def _count_multiplied(params: Any, decoder: DecoderConfig) -> int:
    shapes = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(
        math.prod(x.shape)
        for path, x in shapes
        if path[-1].key != "embedding" or decoder.tied_embeddings
    )
