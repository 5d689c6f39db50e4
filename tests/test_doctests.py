"""Runs the examples in docstrings."""

import doctest
import importlib

import jax.numpy as jnp
import pytest

import trapo_jax.losses
from support.commands import REPOSITORY

# Examples in the losses package assume that `jnp` and the package's public names have been imported.
NAMES = {"jnp": jnp} | {name: getattr(trapo_jax.losses, name) for name in trapo_jax.losses.__all__}
MODULES = [
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for file in sorted((REPOSITORY / "trapo_jax").rglob("*.py"))
    if ">>> " in file.read_text() and file.name != "__main__.py"
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs=NAMES)
    assert result.attempted > 0
    assert result.failed == 0
