"""Computes group-relative advantages on the host."""

import numpy as np

STD_FLOOR = 1e-6


def group_advantages(rewards: np.ndarray, *, scale_by_std: bool = False) -> np.ndarray:
    """Computes `A_j = r_j - mean(r)` over the rollouts of one problem (TRAPO, arXiv 2512.17636).

    Args:
      rewards: `[G]` in [0, 1], rewards of the group's rollouts, both guided and unguided.
      scale_by_std: whether to divide by the sample standard deviation (with denominator `G - 1`), as in GRPO but not in
        TRAPO. The advantages are 0 if all rewards are equal.

    Returns:
      float32 `[G]`, computed in float64.
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = rewards - rewards.mean()
    if scale_by_std and len(rewards) > 1:
        advantages /= rewards.std(ddof=1) + STD_FLOOR
    return advantages.astype(np.float32)
