"""Tests that the wheel works outside a clone of the repository."""

import os
import subprocess
import sys

import pytest

from support.commands import REPOSITORY


@pytest.mark.slow
def test_the_wheel_contains_everything_that_a_run_needs(tmp_path):
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, installed, folder = tmp_path / "wheels", tmp_path / "installed", tmp_path / "empty"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, REPOSITORY]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    assert (installed / "trapo_jax" / "py.typed").exists()
    folder.mkdir()
    small = ["train.num_steps=1", "train.problems_per_step=2", "data.num_test=2"]
    train = ["trapo_jax", "train", "--config", "smoke_cpu", "output_dir=run", *small]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for command in (train, ["trapo_jax", "report", "run", "--out", "report.html"]):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == {"run", "report.html"}
    assert (folder / "run" / "report.html").exists()
