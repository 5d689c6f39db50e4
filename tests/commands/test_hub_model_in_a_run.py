"""Tests runs whose model is given by its Hub id, with a fake Hub cache and without network access."""

import json
import shutil

import pytest

from support.commands import TINY_MODEL, run_command
from support.hub import COMMIT, add_to_cache, folder_files
from support.short_run import TINY_JOB
from trapo_jax import preview, train

FILES = folder_files(TINY_MODEL)
SMALL = {name: content for name, content in FILES.items() if not name.endswith(".safetensors")}
JOB = ("model.path=owner/tiny", *TINY_JOB)


@pytest.mark.slow
def test_a_run_records_the_commit_and_is_resumed_without_the_cache(hub_home, tmp_path):
    run = tmp_path / "run"
    add_to_cache(hub_home, "owner/tiny", FILES)
    result = run_command("trapo_jax.train", f"output_dir={run}", *JOB)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "model" / "hub.json").read_text()) == {
        "name": "owner/tiny",
        "commit": COMMIT,
    }
    exported = folder_files(run / "hf")
    assert "hub.json" not in exported
    shutil.rmtree(hub_home)
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "summary.json").unlink()
    result = run_command("trapo_jax.train", f"output_dir={run}", *JOB)
    assert result.returncode == 0, result.stderr
    assert "after step 1" in result.stdout
    assert folder_files(run / "hf") == exported


def test_only_training_needs_the_weights(hub_home, tmp_path, capsys):
    add_to_cache(hub_home, "owner/tiny", SMALL)
    assert preview.main(JOB) == 0
    capsys.readouterr()
    assert train.main([*JOB, f"output_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors is not in the local Hugging Face Hub cache" in line
    assert line.endswith(f"`hf download owner/tiny --revision {COMMIT}`")
    assert not (tmp_path / "run").exists()
