"""From raw examples to batches of problems, in an order that a step number alone determines."""

from trapo_jax.data.card_shuffles import Example, card_shuffles_splits
from trapo_jax.data.problems import encode_problems, fingerprint, problem_batches
from trapo_jax.data.tokenizer import load_tokenizer

__all__ = [
    "Example",
    "card_shuffles_splits",
    "encode_problems",
    "fingerprint",
    "load_tokenizer",
    "problem_batches",
]
