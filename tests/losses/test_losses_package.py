"""Tests `trapo_jax.losses` as a library: its public names, imports, and numerical guarantees."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trapo_jax
import trapo_jax.losses as losses

PACKAGE = Path(losses.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
HEAVY = ("flax", "optax", "orbax", "transformers", "datasets", "grain", "rich", "pydantic")


def test_every_public_name_exists_and_is_documented():
    assert len(losses.__all__) == len(set(losses.__all__))
    for name in losses.__all__:
        assert inspect.getdoc(getattr(losses, name)), name


def test_every_public_function_of_the_modules_is_exported():
    for file in FILES:
        if file.name.startswith("_"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.name in losses.__all__, f"{file.name}: {node.name}"


def test_the_main_losses_are_exported_at_the_top_level():
    for name in ("trsft_loss", "trsft_loss_from_logprobs", "policy_gradient_loss"):
        assert getattr(trapo_jax, name) is getattr(losses, name)


def test_the_package_imports_jax_only_when_a_loss_is_accessed():
    script = (
        "import sys, trapo_jax\n"
        "assert 'jax' not in sys.modules\n"
        "assert {'trsft_loss', '__version__'} <= set(dir(trapo_jax))\n"
        "from trapo_jax import trsft_loss\n"
        "assert 'jax' in sys.modules and trsft_loss.__module__ == 'trapo_jax.losses.trsft'\n"
        "assert not hasattr(trapo_jax, 'no_such_loss')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_losses_imports_jax_but_no_other_heavy_package():
    script = (
        "import sys, trapo_jax.losses\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = done.stdout.split()
    assert "jax" in imported
    assert not set(HEAVY) & set(imported)


def test_importing_the_losses_imports_no_other_part_of_the_project():
    script = (
        "import sys, trapo_jax.losses\nprint(*[m for m in sys.modules if m.startswith('trapo')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    others = [m for m in done.stdout.split() if not m.startswith("trapo_jax.losses")]
    assert others == ["trapo_jax"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_imports_only_jax_the_standard_library_and_the_losses(file):
    """Also checks imports inside functions, which the tests above would not detect."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}"
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            allowed = (
                top == "jax"
                or top in sys.stdlib_module_names
                or module.startswith("trapo_jax.losses")
            )
            assert allowed, f"{file.name}:{node.lineno}: {module}"


@pytest.mark.parametrize("name", [n for n in losses.__all__ if not n.endswith("weights")])
def test_hyperparameters_are_keyword_only(name):
    """Arrays may be passed by position; all other parameters are keyword-only."""
    arrays = {
        "logits",
        "labels",
        "logprobs",
        "old_logprobs",
        "ref_logprobs",
        "advantages",
        "hidden",
        "unembedding",
        "values",
        "expert_probs",
        "entropies",
        "segment_ids",
    }
    thing = getattr(losses, name)
    if inspect.isclass(thing) or name.endswith("_attenuation"):
        return
    for parameter in inspect.signature(thing).parameters.values():
        expected = parameter.name in arrays
        assert (parameter.kind is parameter.POSITIONAL_OR_KEYWORD) == expected, parameter
        assert expected or parameter.kind is parameter.KEYWORD_ONLY, parameter


# Every loss that is bounded at p = 0, as a function of log-probabilities.
BOUNDED = {
    "trsft": lambda x: losses.trsft_loss_from_logprobs(x),
    "trsft_alpha_1": lambda x: losses.trsft_loss_from_logprobs(x, alpha=1.0),
    "shifted": lambda x: losses.attenuated_cross_entropy_from_logprobs(
        x, attenuation=losses.shifted_clip_attenuation(0.1, 0.05)
    ),
    "shift_array_of_zero": lambda x: losses.attenuated_cross_entropy_from_logprobs(
        x, attenuation=losses.shifted_clip_attenuation(0.1, jnp.float32(0.0))
    ),
    "probability": lambda x: losses.attenuated_cross_entropy_from_logprobs(
        x, attenuation=losses.probability_attenuation()
    ),
    "variance": lambda x: losses.attenuated_cross_entropy_from_logprobs(
        x, attenuation=losses.variance_attenuation()
    ),
    "shaped": lambda x: losses.shaped_policy_gradient_loss(x, 1.0),
    "policy_gradient": lambda x: losses.policy_gradient_loss(x, -1.0, 1.0),
    "gspo": lambda x: losses.sequence_policy_gradient_loss(x, -jnp.ones(3), 1.0),
    "cispo": lambda x: losses.cispo_loss(x, -1.0, 1.0),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("logprob", [-np.inf, -200.0, -90.0])
def test_probability_zero_gives_a_finite_value_and_no_gradient(name, logprob):
    """In float32, exp(-200) is 0 and exp(-90) is denormal."""
    logprobs = jnp.full(3, logprob)
    value, gradient = jax.value_and_grad(lambda x: BOUNDED[name](x).sum())(logprobs)
    assert np.isfinite(value)
    np.testing.assert_allclose(gradient, 0, atol=1e-30)


def test_cross_entropy_at_probability_zero_is_infinite_with_a_finite_gradient():
    loss = lambda x: losses.attenuated_cross_entropy_from_logprobs(
        x, attenuation=losses.unit_attenuation()
    )
    assert loss(-jnp.inf) == np.inf
    assert jax.grad(loss)(-jnp.inf) == -1


@pytest.mark.parametrize("shift", [0.0, 0.5, jnp.float32(0.0), jnp.float32(0.5)])
def test_gradient_exactly_at_alpha_equals_the_weight(shift):
    """At p = alpha = 1, where the two branches meet, the gradient must be neither lost nor halved."""
    attenuation = losses.shifted_clip_attenuation(1.0, shift)
    loss = lambda x: losses.attenuated_cross_entropy_from_logprobs(x, attenuation=attenuation)
    value, gradient = jax.value_and_grad(loss)(0.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    np.testing.assert_allclose(gradient, -(1 - shift), rtol=1e-6)


def test_the_cross_entropy_branch_includes_alpha():
    """The second derivative with respect to log p is 0 for p >= alpha and -p / alpha otherwise."""
    loss = lambda x: losses.trsft_loss_from_logprobs(x, alpha=1.0)
    assert jax.grad(jax.grad(loss))(0.0) == 0
    np.testing.assert_allclose(jax.grad(jax.grad(loss))(-0.5), -np.exp(-0.5), rtol=1e-6)
