"""What every loss does first: fp32, masked inputs made harmless, parameters checked."""

import jax
import jax.numpy as jnp

Array = jax.Array
ArrayLike = jax.typing.ArrayLike


def float32_where(values: ArrayLike, where: ArrayLike | None, fill: float = 0.0) -> Array:
    """`values` in float32 with `fill` wherever `where` is False.

    Filling *before* any exp, log or product is what keeps a NaN or inf in a
    masked place out of the value and out of the gradient.
    """
    values = jnp.asarray(values, jnp.float32)
    return values if where is None else jnp.where(where, values, fill)


def zero_where_masked(values: Array, where: ArrayLike | None) -> Array:
    """Per-token `values`, exactly 0 wherever `where` is False."""
    return values if where is None else jnp.where(where, values, 0.0)


def check_unit_interval(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless 0 < value <= 1; traced values cannot be checked and pass."""
    if not isinstance(value, jax.core.Tracer) and not 0.0 < float(value) <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_not_negative(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless value >= 0; traced values cannot be checked and pass."""
    if not isinstance(value, jax.core.Tracer) and not float(value) >= 0.0:
        raise ValueError(f"{name} must be >= 0, got {value}")
