"""Tests that the README's code runs, and that links and the documented file tree match the repository."""

import re
import subprocess
import sys

import pytest

from support.commands import REPOSITORY, run_process, run_python

README = (REPOSITORY / "README.md").read_text()
PAGES = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md")]
GENERATED = REPOSITORY / "docs" / "reference" / "config.md"
SMALL = {
    "train.num_steps": 1,
    "train.problems_per_step": 2,
    "data.num_test": 2,
    "evaluation.num_samples": 1,
}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_loss_example_runs_and_reduces_the_loss(tmp_path):
    (code,) = [example for example in EXAMPLES if "trsft_loss" in example]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    script = tmp_path / "example.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 2.0  # The initial loss is log 16 = 2.77.


@pytest.mark.slow
def test_training_example_runs(tmp_path):
    (code,) = [example for example in EXAMPLES if "load_config" in example]
    shorter = '"train.num_steps": 1, "data.num_test": 8, "evaluation.num_samples": 1'
    script = tmp_path / "example.py"
    script.write_text(code.replace('"train.num_steps": 10', shorter))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    result = run_python(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder, accuracy = result.stdout.split()
    assert folder.startswith("runs/card_shuffles_trapo-")
    assert 0 <= float(accuracy) <= 1
    assert (tmp_path / folder / "report.html").is_file()


def test_the_documented_file_tree_lists_exactly_the_existing_packages():
    page = (REPOSITORY / "docs" / "reference" / "architecture.md").read_text()
    tree = page.split("## Repository layout")[1]
    named = re.findall(r"^      (\S+)", tree, flags=re.MULTILINE)
    package = REPOSITORY / "trapo_jax"
    exists = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    exists |= {p.parent.name + "/" for p in package.glob("*/__init__.py")}
    assert set(named) == exists


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", *PAGES])
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / page).read_text()):
        target = (REPOSITORY / page).parent / target
        assert target.exists() or target == GENERATED, target


def test_the_readme_can_be_read_in_five_minutes():
    assert len(README.split()) <= 900


@pytest.mark.slow
def test_the_method_of_the_readme_trains(tmp_path):
    (code,) = [example for example in EXAMPLES if "METHOD" in example]
    (tmp_path / "hint.py").write_text(
        code + "\nfrom trapo_jax import load_config\nfrom trapo_jax.train import train\n"
        f"train(load_config(None, {SMALL}), METHOD)\n"
    )
    result = run_python(tmp_path / "hint.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_reward_function_of_the_readme_is_accepted(tmp_path):
    (code,) = [example for example in EXAMPLES if "def brevity" in example]
    (tmp_path / "my_rewards.py").write_text(code)
    result = run_process(
        "trapo_jax.preview", "rewards.functions=[card_shuffles,my_rewards:brevity]", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
