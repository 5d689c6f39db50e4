"""The optimizer and the learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from trapo_jax.types import StagePosition


def make_learning_rate(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_start: float,
    final_learning_rate_ratio: float,
) -> Callable[[StagePosition], float]:
    """Builds a schedule with linear warm-up, a constant phase and linear decay.

    The learning rate is the product of the peak, `min(1, step / warmup_steps)`, and a factor that is 1 until
    `decay_start` and decreases linearly to `final_learning_rate_ratio` at the end.

    Args:
      learning_rate: peak learning rate.
      warmup_steps: number of warm-up steps.
      decay_start: fraction of the stage in [0, 1] after which the learning rate decays.
      final_learning_rate_ratio: learning rate at the end as a fraction of the peak.

    Returns:
      A function of a step's position within its stage.
    """

    def rate(position: StagePosition) -> float:
        warmup = min(1.0, position.step / warmup_steps) if warmup_steps else 1.0
        remaining = 1.0 - decay_start
        decayed = max(0.0, position.progress - decay_start) / remaining if remaining else 0.0
        return learning_rate * warmup * (1.0 - (1.0 - final_learning_rate_ratio) * decayed)

    return rate


def make_optimizer(
    *, adam_b1: float, adam_b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds AdamW for a learning rate of 1; the train step clips gradients before it, and scales its updates.

    Weight decay does not apply to normalization scales and biases.

    Args:
      adam_b1: decay rate of the first moment, in [0, 1).
      adam_b2: decay rate of the second moment, in [0, 1).
      weight_decay: weight decay, >= 0.
    """
    return optax.chain(
        optax.scale_by_adam(b1=adam_b1, b2=adam_b2),
        optax.scale(-1.0),
        optax.add_decayed_weights(-weight_decay, _is_decayed),
    )


def _is_decayed(params: Any) -> Any:
    """Returns a tree that is True for parameters with weight decay: all but normalization scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
