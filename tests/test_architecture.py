"""Tests that imports between packages follow the layers in CONTRIBUTING.md."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from support.commands import REPOSITORY
from trapo_jax.__main__ import COMMANDS

PACKAGE = REPOSITORY / "trapo_jax"
CONTRACT = (REPOSITORY / "CONTRIBUTING.md").read_text()


def contract():
    """Returns the packages that each package may import, lowest layer first, as listed in CONTRIBUTING.md."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", CONTRACT, flags=re.MULTILINE)
    return {package: re.findall(r"`(\w+)`", allowed) for package, allowed in rows}


def imports_of(package):
    """Yields the other trapo_jax packages that a package or module imports."""
    files = [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").exists() else []
    files += (PACKAGE / package).rglob("*.py")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                if parts[0] == "trapo_jax" and len(parts) > 1 and parts[1] != package:
                    yield parts[1]


def test_the_contract_lists_every_package():
    packages = {p.stem for p in PACKAGE.glob("*.py")}
    packages |= {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert set(contract()) == packages - {*COMMANDS, "__init__", "__main__"}


def test_every_package_imports_only_what_the_contract_allows():
    for package, allowed in contract().items():
        assert set(imports_of(package)) <= set(allowed), f"{package}: see CONTRIBUTING.md"


def test_the_contract_allows_no_upward_and_hence_no_circular_imports():
    above = set(contract())
    for package, allowed in contract().items():
        assert not above & set(allowed), package
        above.remove(package)
        assert package not in allowed


def test_losses_import_only_jax():
    for file in (PACKAGE / "losses").glob("*.py"):
        assert modules_imported(file) <= {"jax", "trapo_jax", *sys.stdlib_module_names}, file


@pytest.mark.parametrize("module", ["rollouts.guidance", "sampling.slots"])
def test_host_only_modules_do_not_import_jax(module):
    code = f"import sys, trapo_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_commands_do_not_import_each_other():
    for command in COMMANDS:
        assert not set(imports_of(command)) & set(COMMANDS), command


def test_imported_packages_are_declared_as_dependencies():
    """An undeclared package is installed only if another package or an extra depends on it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("tasks", "wandb", "trackio")]
    requirements = [*project["dependencies"], *itertools.chain(*extras)]
    declared = {canonical(re.match(r"[\w.-]+", text)[0]) for text in requirements}
    providers = metadata.packages_distributions()
    for file in PACKAGE.rglob("*.py"):
        for name in modules_imported(file) - {"trapo_jax"} - set(sys.stdlib_module_names):
            assert {canonical(d) for d in providers.get(name, [name])} & declared, f"{file}: {name}"


def test_the_tested_environment_satisfies_every_requirement():
    """`constraints.txt` has one version of each dependency, including those of the extras that CI installs."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {
        canonical(name): tested
        for line in lines
        if not line.startswith("#")
        for name, _, tested in [line.partition("==")]
    }
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(x for name, x in extras.items() if "cuda" not in name)]
    for text in itertools.chain(*groups):
        requirement = Requirement(text)
        if requirement.name != "trapo-jax":
            assert pinned[canonical(requirement.name)] in requirement.specifier, text


def modules_imported(file):
    """Returns the top-level names of all modules that a file imports, including inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_entry_points_can_be_imported_alone():
    """Only entry points are tested, because one process per module would take minutes."""
    for module in (
        "trapo_jax.losses",
        "trapo_jax.rollouts.guidance",
        "trapo_jax.train",
        "trapo_jax.evaluate",
    ):
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
        assert result.returncode == 0, result.stderr
