"""Sampling completions from the policy."""

from trapo_jax.sampling.engine import JaxEngine, RolloutEngine

__all__ = ["JaxEngine", "RolloutEngine"]
