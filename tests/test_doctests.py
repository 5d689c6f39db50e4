"""The examples in the docstrings hold."""

import doctest
import importlib

import jax.numpy as jnp
import pytest

import trapo_jax.losses

# Examples of the losses take `jnp` and the package's public names as imported.
NAMES = {"jnp": jnp} | {name: getattr(trapo_jax.losses, name) for name in trapo_jax.losses.__all__}
MODULES = (
    "trapo_jax.data.card_shuffles",
    "trapo_jax.data.columns",
    "trapo_jax.evaluation.scoring",
    "trapo_jax.import_path",
    "trapo_jax.losses.attenuation",
    "trapo_jax.losses.kl",
    "trapo_jax.losses.logprobs",
    "trapo_jax.losses.policy_gradient",
    "trapo_jax.losses.reductions",
    "trapo_jax.losses.trsft",
    "trapo_jax.rewards.extraction",
    "trapo_jax.rewards.math",
    "trapo_jax.rewards.multiple_choice",
    "trapo_jax.sampling.prefix_cache",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs=NAMES)
    assert result.attempted > 0
    assert result.failed == 0
