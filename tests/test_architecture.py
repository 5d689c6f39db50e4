"""The shape of the house: no import circle, every room in its place."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata

from support.commands import REPOSITORY
from trapo_jax.__main__ import COMMANDS

PACKAGE = REPOSITORY / "trapo_jax"
LEAVES = {"types", "sandbox", "import_path"}
# Commands may import every package, but not each other.
SEES_ALL = {*COMMANDS, "__main__", "parts"}
# What a package may import besides the leaves.
MAY_IMPORT = {
    "config": {"methods"},
    "losses": set(),
    "models": {"config"},
    "rewards": set(),
    "distributed": set(),
    "planning": {"config", "distributed", "methods", "models", "sampling", "training"},
    "data": {"config"},
    "methods": {"losses"},
    "sampling": {"models", "distributed"},
    "rollouts": {"config", "methods", "models", "rewards", "sampling", "distributed"},
    "training": {"config", "losses", "methods", "models", "distributed"},
    "runs": {"config", "distributed", "methods", "models"},
    "evaluation": {"distributed"},
    "comparison": {"config", "evaluation", "runs"},
    "types": set(),
    "sandbox": set(),
    "import_path": set(),
}


def rooms_imported(room):
    """The rooms of trapo_jax that a room's files import."""
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else []
    files += (PACKAGE / room).rglob("*.py")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                if parts[0] == "trapo_jax" and len(parts) > 1 and parts[1] != room:
                    yield parts[1]


def test_data_flows_one_way():
    rooms = {p.stem for p in PACKAGE.glob("*.py")} | {
        p.parent.name for p in PACKAGE.glob("*/__init__.py")
    }
    assert rooms - {"__init__"} - SEES_ALL == set(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        assert set(rooms_imported(room)) <= allowed | LEAVES, room


def test_commands_do_not_import_each_other():
    for command in COMMANDS:
        assert not set(rooms_imported(command)) & set(COMMANDS), command


def test_what_is_imported_is_declared():
    """Else it is there by accident: another package, or an extra, happens to bring it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["tasks"]]
    declared = {canonical(re.match(r"[\w.-]+", text)[0]) for text in wanted}
    providers = metadata.packages_distributions()
    for file in PACKAGE.rglob("*.py"):
        for name in modules_imported(file) - {"trapo_jax"} - set(sys.stdlib_module_names):
            assert {canonical(d) for d in providers.get(name, [name])} & declared, f"{file}: {name}"


def modules_imported(file):
    """Top-level names of the modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_module_imports_on_its_own():
    """One process a module would take minutes; a fresh interpreter each for the entry points."""
    for module in (
        "trapo_jax.losses",
        "trapo_jax.rollouts.guidance",
        "trapo_jax.train",
        "trapo_jax.evaluate",
    ):
        result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
        assert result.returncode == 0, result.stderr
