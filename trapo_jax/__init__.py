"""TRAPO (Trust-Region Adaptive Policy Optimization, arXiv 2512.17636) in JAX.

`trapo_jax.losses` is the loss library; `python -m trapo_jax.train` trains.
"""

from trapo_jax.losses import (
    attenuated_cross_entropy_from_logprobs,
    policy_gradient_loss,
    trsft_loss,
    trsft_loss_from_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attenuated_cross_entropy_from_logprobs",
    "policy_gradient_loss",
    "trsft_loss",
    "trsft_loss_from_logprobs",
]
