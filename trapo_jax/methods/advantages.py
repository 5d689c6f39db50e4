"""Group-relative advantages, on the host."""

import numpy as np

STD_FLOOR = 1e-6


def group_advantages(rewards: np.ndarray, *, scale_by_std: bool = False) -> np.ndarray:
    """`A_j = r_j - mean(r)`, over the rollouts of one problem (TRAPO, arXiv 2512.17636).

    Args:
      rewards: `[G]` in [0, 1], the group's rollouts, guided and unguided alike.
      scale_by_std: divide by the standard deviation as GRPO did at first; a group of equal rewards
        keeps advantages 0. TRAPO does not.

    Returns:
      float32 `[G]`, computed in float64.
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = rewards - rewards.mean()
    if scale_by_std:
        advantages /= rewards.std() + STD_FLOOR
    return advantages.astype(np.float32)
