"""Builds the optimizer and the learning-rate schedule.

The settings are fields of `TrainConfig` in `config/schema.py`; `learner.py` passes them to this module. `train_step.py`
clips the gradients and applies the updates.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


def make_learning_rate(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_start: float,
    final_learning_rate_ratio: float,
) -> Callable[[float, float], float]:
    """Builds a schedule with linear warm-up, a constant phase, and linear decay.

    The learning rate is the product of the peak, `min(1, step / warmup_steps)`, and a factor that is 1 until
    `decay_start` and decreases linearly to `final_learning_rate_ratio` at the end.

    Args:
      learning_rate: peak learning rate.
      warmup_steps: number of warm-up steps.
      decay_start: fraction of the stage in [0, 1] after which the learning rate decays.
      final_learning_rate_ratio: learning rate at the end as a fraction of the peak.

    Returns:
      A function of `(step, progress)` within a stage. `step` is the number of completed training steps, including the
      fraction of the current step that is complete after the optimizer step. `progress` is the fraction of the stage
      that was complete before the current training step.
    """

    def rate(step: float, progress: float) -> float:
        warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        remaining = 1.0 - decay_start
        decayed = max(0.0, progress - decay_start) / remaining if remaining else 0.0
        return learning_rate * warmup * (1.0 - (1.0 - final_learning_rate_ratio) * decayed)

    return rate


def make_optimizer(
    *, adam_b1: float, adam_b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Builds AdamW with a learning rate of 1; the train step clips the gradients and scales the updates.

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
