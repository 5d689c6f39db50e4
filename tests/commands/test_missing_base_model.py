"""Tests that runs can be resumed, exported and evaluated after their initial model folder has been deleted."""

import json
import shutil

import pytest

from support.commands import TINY_MODEL, run_command
from support.short_run import TINY_JOB


@pytest.fixture(scope="module")
def run_without_base(tmp_path_factory):
    """Returns a finished run, whose initial model folder (with several EOS ids) has been deleted, and its options."""
    root = tmp_path_factory.mktemp("missing_base")
    base = shutil.copytree(TINY_MODEL, root / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.9}')
    options = [*TINY_JOB, f"model.path={base}"]
    result = run_command("trapo_jax.train", f"output_dir={root / 'run'}", *options)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(base)
    return root / "run", options


def unfinished(run, folder, last_step):
    """Copies a run as if it had been interrupted after step `last_step`."""
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hf")
    for step in range(last_step + 1, 3):
        shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(run_without_base, tmp_path):
    run, options = run_without_base
    again = unfinished(run, tmp_path / "run", last_step=1)
    result = run_command("trapo_jax.train", f"output_dir={again}", *options)
    assert result.returncode == 0, result.stderr
    assert "after step 1" in result.stdout
    for file in (run / "hf").iterdir():
        assert (again / "hf" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_all_eos_ids(run_without_base, tmp_path):
    run, _ = run_without_base
    arguments = ("--checkpoint", run / "checkpoints/2", "--out", tmp_path / "out")
    result = run_command("trapo_jax.export", *arguments)
    assert result.returncode == 0, result.stderr
    for file in (run / "hf").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(content) == {"eos_token_id", "top_p"}
    assert len(content["eos_token_id"]) == 2


@pytest.mark.slow
def test_a_checkpoint_can_be_evaluated(run_without_base, tmp_path):
    run = unfinished(run_without_base[0], tmp_path / "run", last_step=2)
    result = run_command(
        "trapo_jax.evaluate",
        f"model.path={run}",
        f"output_dir={tmp_path / 'evaluation'}",
        "evaluation.num_samples=1",
    )
    assert result.returncode == 0, result.stderr


def test_a_run_without_a_checkpoint_needs_its_initial_model_folder(run_without_base, tmp_path):
    run, options = run_without_base
    again = unfinished(run, tmp_path / "run", last_step=0)
    result = run_command("trapo_jax.train", f"output_dir={again}", *options)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "base': no such folder" in line
