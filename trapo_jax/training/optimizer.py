"""The optimizer and the learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def make_learning_rate(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    decay_start: float,
    final_learning_rate_ratio: float,
) -> Callable[[float, float], float]:
    """Builds a schedule with linear warm-up, a constant phase and linear decay.

    Args:
      learning_rate: peak learning rate.
      warmup_steps: number of warm-up steps.
      num_steps: length of the run in steps.
      decay_start: share of the run in [0, 1] after which the learning rate decays.
      final_learning_rate_ratio: learning rate at the end as a share of the peak.

    Returns:
      A function of `(step, position)`. `step` is the number of steps since the start of the run; it is 1 at the end of
      the first step. `position` is the progress of the run in units of steps. It equals `step`, or is larger if a
      budget will end the run before `num_steps`.
    """
    begin = max(warmup_steps, round(decay_start * num_steps))
    warmup = jax.jit(optax.linear_schedule(0.0, learning_rate, warmup_steps))
    decay = optax.linear_schedule(
        learning_rate, learning_rate * final_learning_rate_ratio, max(1, num_steps - begin)
    )
    main = jax.jit(optax.join_schedules([optax.constant_schedule(learning_rate), decay], [begin]))

    def rate(step: float, position: float) -> float:
        value: Any = warmup(step) if step < warmup_steps else main(position)
        return float(value)

    return rate


def make_optimizer(
    *, adam_b1: float, adam_b2: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Builds AdamW with gradient clipping for a learning rate of 1; the train step scales its updates.

    Weight decay does not apply to normalization scales and biases.

    Args:
      adam_b1: decay rate of the first moment, in [0, 1).
      adam_b2: decay rate of the second moment, in [0, 1).
      weight_decay: weight decay, >= 0.
      max_grad_norm: the global norm of the gradient is clipped to this value, > 0.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1=adam_b1, b2=adam_b2),
        optax.scale(-1.0),
        optax.add_decayed_weights(-weight_decay, _is_decayed),
    )


def _is_decayed(params: Any) -> Any:
    """Returns a tree that is True for parameters with weight decay: all but normalization scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
