"""Verifiers: from a response's text to a verdict.

A `Verify` is a plain function `(response_text, problem) -> Verdict`. The loop does not call it but a
`Verifier`, which hands out futures: `InlineVerifier` for functions that are quick on any text,
`VerifierPool` for those that a hostile text can hold, each in processes that are killed at a deadline.
"""

from trapo_jax.rewards.by_source import verify_by_source
from trapo_jax.rewards.card_shuffles import card_shuffles_verifier
from trapo_jax.rewards.math import extract_math_answer, verify_math
from trapo_jax.rewards.multiple_choice import extract_choice, verify_multiple_choice
from trapo_jax.rewards.pool import VerifierPool
from trapo_jax.rewards.verifier import InlineVerifier, Verifier, Verify, make_verifier
from trapo_jax.types import REWARDS

__all__ = [
    "REWARDS",
    "InlineVerifier",
    "Verifier",
    "VerifierPool",
    "Verify",
    "card_shuffles_verifier",
    "extract_choice",
    "extract_math_answer",
    "make_verifier",
    "verify_by_source",
    "verify_math",
    "verify_multiple_choice",
]
