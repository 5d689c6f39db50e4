"""Helpers shared by all losses: conversion to float32, masking, and parameter checks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

Array = jax.Array
ArrayLike = jax.typing.ArrayLike

# Log-ratios of probabilities beyond this value are replaced by it before exp, so that losses and gradient norms do not
# overflow. As in verl; no useful update moves a probability by a factor of exp(20) = 5e8.
MAX_LOG_RATIO = 20.0


def float32_where(values: ArrayLike, where: ArrayLike | None) -> Array:
    """Returns `values` in float32, with 0 where `where` is False.

    Masking inputs *before* any exp, log, or product keeps NaNs and infinities at masked elements from propagating to
    the value and the gradient.
    """
    values = jnp.asarray(values, jnp.float32)
    return values if where is None else jnp.where(where, values, 0.0)


def zero_where_masked(values: Array, where: ArrayLike | None) -> Array:
    """Returns per-token `values`, exactly 0 where `where` is False."""
    return values if where is None else jnp.where(where, values, 0.0)


def check_unit_interval(name: str, value: Any) -> None:
    """Raises ValueError unless 0 < value <= 1. Traced values are not checked."""
    if _is_known(value) and not (value > 0 and value <= 1):
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless 0 <= value <= 1. Traced values are not checked."""
    if _is_known(value) and not (value >= 0 and value <= 1):
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless value >= 0. Traced values are not checked."""
    if _is_known(value) and not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless value > 0. Traced values are not checked."""
    if _is_known(value) and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _is_known(value: Any) -> bool:
    return not isinstance(value, Tracer)
