"""Tests that every file of the package meets the guarantees in SECURITY.md about external code."""

import ast
import re
import tomllib

import pytest

from support.commands import REPOSITORY
from trapo_jax.config import Config, load_config
from trapo_jax.types import UserError

PACKAGE = REPOSITORY / "trapo_jax"
# Modules that execute or unpickle their input.
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "code",
    "torch",
}
# Built-in functions that execute text. Methods with these names, such as `model.eval()`, are allowed.
BUILT_INS = {"eval", "exec", "compile", "__import__"}
# Module functions, listed by the last two parts of their qualified names.
FUNCTIONS = {
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}  # arguments that may only be False
SAFE_LOADER = "_Loader"  # the subclass of SafeLoader that loads configs


def violations(text):
    """Yields (line, name) pairs for the parts of a source file that might execute their input as code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            found = list(calls(node))
        elif isinstance(node, ast.Name) and node.id in BUILT_INS:
            found = [node.id]  # for example, `run = eval`
        else:
            found = []
        for name in found:
            yield node.lineno, name


def calls(node):
    name = ast.unparse(node.func)
    if ".".join(name.split(".")[-2:]) in FUNCTIONS and not is_safe_yaml(node):
        yield name
    for keyword in node.keywords:
        given = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in KEYWORDS and not given:
            yield keyword.arg


def is_safe_yaml(node):
    return any(isinstance(a, ast.Name) and a.id == SAFE_LOADER for a in node.args)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "import torch.nn",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "yaml.load(text, yaml.Loader)",
    ],
)
def test_code_execution_is_detected(text):
    assert list(violations(text))


@pytest.mark.parametrize(
    "text",
    [
        "jax.eval_shape(f)",
        "model.eval()",
        "re.compile('a')",
        "step.lower(x).compile()",
        "np.load('x')",
    ],
)
def test_harmless_calls_are_not_reported(text):
    assert not list(violations(text))


def test_the_package_does_not_run_code_that_it_reads():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if here := list(violations(file.read_text())):
            found[file.name] = here
    assert not found


def test_yaml_with_python_objects_is_rejected_and_not_executed(tmp_path):
    witness = tmp_path / "witness"
    file = tmp_path / "config.yaml"
    for tag in ("object/apply:os.system", "object/new:os.system"):
        file.write_text(f"seed: !!python/{tag} ['touch {witness}']\n")
        with pytest.raises(UserError, match="not valid YAML"):
            load_config(Config, file, [])
    assert not witness.exists()


@pytest.mark.parametrize(
    ("package", "fixed"),
    [("transformers", (5, 3)), ("jinja2", (3, 1, 6)), ("pyyaml", (5, 4)), ("pyarrow", (14, 0, 1))],
)
def test_versions_with_known_vulnerabilities_are_excluded(package, fixed):
    """The vulnerabilities are CVE-2026-4372 and CVE-2026-5241 (transformers), CVE-2025-27516 (Jinja2), CVE-2020-14343
    (PyYAML) and CVE-2023-47248 (PyArrow).
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (requirement,) = [text for text in project["dependencies"] if re.match(rf"{package}\b", text)]
    lowest = re.search(r">=([\d.]+)", requirement)[1]
    assert tuple(map(int, lowest.split("."))) >= fixed
