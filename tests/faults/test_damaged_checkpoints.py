"""Checks that damaged or missing checkpoint files are detected and named, and that runs resume from intact ones."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fault_harness.comparison import differences
from support.commands import run_command
from support.short_run import JOB, checkpoint_steps
from trapo_jax.distributed.sharding import abstract_like
from trapo_jax.runs.checkpoints import CheckpointStore
from trapo_jax.runs.manifests import MANIFEST, DamagedCheckpoint
from trapo_jax.train import main as train

STATE = {"w": jnp.arange(4096.0).reshape(64, 64) / 7, "n": jnp.int32(4)}
HOST = {"counters": {"a": 1}, "name": "x"}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(3, STATE, HOST)
    store.save(6, STATE, HOST)
    return store


def files_of(tmp_path, step):
    folder = tmp_path / "checkpoints" / str(step)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def abstract():
    return abstract_like(STATE, jax.tree.map(lambda x: x.sharding, STATE))


def assert_detected(store, path, tmp_path):
    name = path.relative_to(tmp_path / "checkpoints" / "6").as_posix()
    with pytest.raises(DamagedCheckpoint) as error:
        store.verify(6)
    assert "checkpoint 6" in str(error.value)
    assert name in str(error.value)


def test_every_flipped_bit_is_detected_and_its_file_is_named(store, tmp_path):
    rng = random.Random(0)
    files = [path for path in files_of(tmp_path, 6) if path.stat().st_size]
    assert any(path.name == MANIFEST for path in files)
    for i in range(50):
        path = files[i % len(files)]
        intact = path.read_bytes()
        flipped = bytearray(intact)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert_detected(store, path, tmp_path)
        path.write_bytes(intact)
    store.verify(6)


def test_every_truncated_file_is_detected_and_named(store, tmp_path):
    rng = random.Random(1)
    files = [path for path in files_of(tmp_path, 6) if path.stat().st_size]
    for i in range(20):
        path = files[i % len(files)]
        intact = path.read_bytes()
        path.write_bytes(intact[: rng.randrange(len(intact))])
        assert_detected(store, path, tmp_path)
        path.write_bytes(intact)
    store.verify(6)


def test_every_deleted_file_is_detected_and_named(store, tmp_path):
    files = files_of(tmp_path, 6)
    for i in range(10):
        path = files[i % len(files)]
        intact = path.read_bytes()
        path.unlink()
        assert_detected(store, path, tmp_path)
        path.write_bytes(intact)
    store.verify(6)


def test_an_unexpected_file_is_detected(store, tmp_path):
    (tmp_path / "checkpoints" / "6" / "more").write_text("")
    with pytest.raises(DamagedCheckpoint, match="checkpoint 6: more is not listed in its manifest"):
        store.verify(6)


def test_damaged_checkpoints_are_kept_but_no_longer_listed(store):
    first = store.mark_damaged(6)
    assert store.steps() == [3]
    store.save(6, STATE, HOST)
    second = store.mark_damaged(6)
    for step in (9, 12, 15):
        store.save(step, STATE, HOST)
    assert store.damaged() == sorted([first, second])
    state, host = store.restore(15, abstract())
    np.testing.assert_array_equal(state["w"], STATE["w"])
    assert host == HOST


@pytest.mark.slow
def test_a_run_falls_back_to_the_previous_checkpoint_with_the_same_result(finished_run, tmp_path):
    uninterrupted, folder = finished_run[0], tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hf")
    array = max((folder / "checkpoints" / "12").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 4
    array.write_bytes(content)
    result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
    assert result.returncode == 0, result.stderr
    output = (result.stdout + result.stderr).splitlines()
    (warning,) = [line for line in output if line.startswith("warning")]
    assert f"checkpoint 12: {array.relative_to(folder / 'checkpoints' / '12')}" in warning
    _, second, *_ = sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir())[::-1]
    assert f"resuming {folder} after step {second}" in result.stdout
    shutil.rmtree(folder / "checkpoints" / "12.damaged")
    assert differences(folder, uninterrupted) == []


def test_a_run_without_an_intact_checkpoint_is_not_modified(finished_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / MANIFEST).unlink()
    files = ("metrics.jsonl", "samples.jsonl", "config.yaml")
    before = [(folder / name).read_bytes() for name in files]
    for _ in range(2):  # The second attempt does not start the run over, either.
        assert train([f"output_dir={folder}", *JOB, "checkpoint.keep=3"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "all checkpoints are damaged (" in error
        assert "12.damaged" in error
        assert [(folder / name).read_bytes() for name in files] == before


@pytest.mark.slow
def test_swapped_checkpoints_are_rejected_and_a_copied_one_is_ignored(
    finished_run, tmp_path, capsys
):
    """If checkpoint names did not match their contents, a run would silently continue from the wrong state."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    (folder / "summary.json").unlink()
    checkpoints = folder / "checkpoints"
    *others, old, new = checkpoint_steps(folder)
    for step in others:
        shutil.rmtree(checkpoints / str(step))
    (checkpoints / "notes").mkdir()
    shutil.copytree(checkpoints / str(old), checkpoints / "99")
    assert train([f"output_dir={folder}", *JOB]) == 0
    output = capsys.readouterr()
    assert f"checkpoint 99: it was saved after step {old}; restore its original name" in output.err
    assert f"resuming {folder} after step {new}" in output.out
    assert "ignoring notes" in output.out
    assert {p.name for p in checkpoints.iterdir()} >= {"99", "notes"}

    (folder / "summary.json").unlink()
    shutil.rmtree(checkpoints / "99")
    for a, b in ((old, "x"), (new, old), ("x", new)):
        (checkpoints / str(a)).rename(checkpoints / str(b))
    assert train([f"output_dir={folder}", *JOB]) == 2
    assert "none of the checkpoints were saved by this run" in capsys.readouterr().err
