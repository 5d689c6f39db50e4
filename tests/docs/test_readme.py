"""README's code runs as it stands; its file tree is the tree."""

import re
import subprocess
import sys

from support.commands import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_loss_example_runs_and_learns(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    script = tmp_path / "example.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 2.0  # from log 16 = 2.77


def test_file_tree_names_what_exists_and_all_of_it():
    tree = README.split("## Repository layout")[1].split("## ")[0]
    named = re.findall(r"^      (\S+)", tree, flags=re.MULTILINE)
    package = REPOSITORY / "trapo_jax"
    exists = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    exists |= {p.parent.name + "/" for p in package.glob("*/__init__.py")}
    assert set(named) == exists


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target
