"""Tests the retention, cleanup, and exact restoration of checkpoints, and that logs are truncated accordingly."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.distributed.sharding import abstract_like
from trapo_jax.methods.advantages import group_advantages
from trapo_jax.runs.checkpoints import (
    CheckpointStore,
    ForeignCheckpoint,
    Retention,
)
from trapo_jax.runs.loggers import RunLog, read_metrics
from trapo_jax.runs.manifests import DamagedCheckpoint, _checksum_of, read_manifest, write_manifest
from trapo_jax.types import UserError

STATE = {"w": jnp.arange(6.0).reshape(2, 3) / 7, "n": jnp.int32(4)}
HOST = {"counters": {"a": 1}, "name": "x", "list": [1, 2.5, None]}


def restore(store, step):
    return store.restore(step, abstract_like(STATE, jax.tree.map(lambda x: x.sharding, STATE)))


def test_a_checkpoint_restores_exactly_what_was_saved(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    assert store.steps() == []
    store.save(3, STATE, HOST)
    state, host = restore(store, 3)
    assert host == HOST
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(STATE), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_the_store_keeps_the_newest_checkpoints_and_removes_leftovers(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(1, STATE, HOST)
    leave_an_interrupted_save(tmp_path / "c", 2)
    assert store.steps() == [1]
    for step in (6, 9, 12):
        store.save(step, STATE, HOST)
    assert store.steps() == [9, 12]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["12", "9"]


def test_a_checkpoint_before_the_first_step_counts(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(0, STATE, HOST)
    leave_an_interrupted_save(tmp_path / "c", 0)
    assert store.steps() == [0]
    assert store.unknown() == []
    for step in (1, 2):
        store.save(step, STATE, HOST)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "2"]


def leave_an_interrupted_save(directory, step):
    """Writes the files that remain if a process is killed during a save."""
    (directory / ".saving").write_text(f"{step}.writing")
    partial = directory / f"{step}.writing.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "array").write_text("x")


@pytest.mark.parametrize("has_next_save", [True, False])
def test_an_interrupted_deletion_is_completed(has_next_save, tmp_path):
    directory = tmp_path / "c"
    store = CheckpointStore(directory)
    store.save(1, STATE, HOST)
    store.save(2, STATE, HOST)
    (directory / "1").rename(directory / "1.expired")
    for path in (directory / "1.expired" / "host").iterdir():
        path.unlink()
    if has_next_save:
        store.save(3, STATE, HOST)
    else:  # The run was killed during its last save.
        leave_an_interrupted_save(directory, 3)
        store.clean()
    expected = ["2", "3"] if has_next_save else ["2"]
    assert sorted(path.name for path in directory.iterdir()) == expected


def test_checkpoints_that_had_expired_when_a_run_was_killed_are_deleted(tmp_path):
    directory = tmp_path / "c"
    store = CheckpointStore(directory, Retention(newest=3))
    for step in (1, 2, 3):
        store.save(step, STATE, HOST)
    CheckpointStore(directory, Retention(newest=2)).clean()
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


FOREIGN = (
    "12_backup/file", "notes.txt", "best/file", "1.old/file", "2.expired/file", "3.writing/file", "4.damaged.zip",
    "5.orbax-checkpoint-tmp/file", ".hidden", ".saving.txt", "007/file", "1e3/file", "\u0661\u0662/file", "6 (copy)/file",
    "latest", "tmp/deep/er/file", "7.writing.bak/file", "8.expired.txt", "-1/file", "1.0/file",
)  # fmt: skip


def test_files_that_the_store_did_not_write_are_never_touched(tmp_path):
    directory = tmp_path / "c"
    for name in FOREIGN:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    before = snapshot(directory)
    store = CheckpointStore(directory, identity={"id": "a"})
    for step in (10, 20, 30):
        store.save(step, STATE, HOST)
    assert store.steps() == [20, 30]
    after = snapshot(directory)
    assert {name: after.get(name) for name in before} == before
    assert "12_backup" in store.unknown()
    assert "20" not in store.unknown()


def test_a_foreign_file_in_an_expired_checkpoint_is_kept(tmp_path):
    store = CheckpointStore(tmp_path / "c", Retention(newest=1))
    store.save(1, STATE, HOST)
    (tmp_path / "c" / "1" / "state" / "my_notes.txt").write_text("mine")
    store.save(2, STATE, HOST)
    store.save(3, STATE, HOST)
    assert snapshot(tmp_path / "c" / "1.expired") == {
        "state": None,
        "state/my_notes.txt": b"mine",
    }


def test_a_manifest_cannot_delete_files_elsewhere(tmp_path):
    store = CheckpointStore(tmp_path / "c", Retention(newest=1))
    (tmp_path / "victim").write_text("mine")
    store.save(1, STATE, HOST)
    folder = tmp_path / "c" / "1"
    (folder / "manifest.json").unlink()
    write_manifest(folder, {"step": 1, "run": {}, "score": None})
    content = read_manifest(folder)
    content["files"]["../../victim"] = "0"
    text = json.dumps({**content, "sha256": _checksum_of(content)}, indent=1)
    (folder / "manifest.json").write_text(text)
    store.save(2, STATE, HOST)
    assert not folder.exists()
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_checkpoint_with_a_manifest_of_another_version_is_rejected(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(1, STATE, HOST)
    (tmp_path / "c" / "1" / "manifest.json").unlink()
    write_manifest(tmp_path / "c" / "1", {"score": None})
    with pytest.raises(DamagedCheckpoint, match="was written by a different version"):
        store.verify(1)


def test_a_renamed_swapped_or_copied_checkpoint_is_detected(tmp_path):
    ours = CheckpointStore(tmp_path / "c", Retention(newest=9), identity={"id": "a"})
    theirs = CheckpointStore(tmp_path / "d", Retention(newest=9), identity={"id": "b"})
    for step in (4, 8, 12):
        ours.save(step, STATE, HOST)
    for step in (8, 20):
        theirs.save(step, STATE, HOST)
    (tmp_path / "c" / "8").rename(tmp_path / "c" / "x")
    (tmp_path / "c" / "12").rename(tmp_path / "c" / "8")
    (tmp_path / "c" / "x").rename(tmp_path / "c" / "12")
    shutil.copytree(tmp_path / "d" / "8", tmp_path / "c" / "16")
    shutil.copytree(tmp_path / "d" / "20", tmp_path / "c" / "20")
    ours.verify(4)
    for step, message in (
        (8, "checkpoint 8: it was saved after step 12"),
        (12, "checkpoint 12: it was saved after step 8"),
        (16, "checkpoint 16: it was saved after step 8"),
        (
            20,
            r"checkpoint 20: it was saved by a different run or with a different config \(id differs\)",
        ),
    ):
        with pytest.raises(ForeignCheckpoint, match=message):
            ours.verify(step)
    # Commands that do not resume the run accept checkpoints of any run.
    CheckpointStore(tmp_path / "c").verify(20)


def test_a_checkpoint_of_another_run_is_moved_aside_and_not_overwritten(tmp_path):
    ours = CheckpointStore(tmp_path / "c", identity={"id": "a"})
    theirs = CheckpointStore(tmp_path / "d", identity={"id": "b"})
    theirs.save(3, STATE, HOST)
    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "d" / "3", tmp_path / "c" / "3")
    before = snapshot(tmp_path / "c" / "3")
    ours.save(3, STATE, HOST)
    ours.verify(3)
    assert snapshot(tmp_path / "c" / "3.aside") == before


def test_the_store_keeps_the_newest_and_the_best_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path / "c", Retention(newest=1, best=1))
    for step, score in ((2, 0.1), (3, 0.9), (4, None), (5, 0.5), (6, 0.9), (7, None)):
        store.save(step, STATE, HOST, score=score)
    assert store.steps() == [6, 7]  # Steps 3 and 6 have equal scores, so the later one is kept.
    assert store.best_score() == 0.9
    # A run that was resumed from an earlier step saves the checkpoint of step 7 again.
    store.save(7, STATE, HOST, score=1.0)
    assert store.steps() == [7]


def test_log_is_truncated_to_its_length_at_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.5})
    offsets = log.offsets()
    log.metrics("train", 2, {"a": float("nan")})
    log.samples([{"text": "\x1b[31m\nred"}])
    log.close()
    assert read_metrics(tmp_path)[1] == {"step": 2, "kind": "train", "a": None}
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
    log = RunLog(tmp_path, offsets=offsets, run_id="1a")
    log.metrics("train", 2, {"a": 2.5})
    log.close()
    assert [r["a"] for r in read_metrics(tmp_path)] == [1.5, 2.5]
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert "\x1b" not in json.dumps(read_metrics(tmp_path))


def test_log_shorter_than_at_the_checkpoint_is_rejected(tmp_path):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.5})
    offsets = log.offsets()
    log.close()
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(
        UserError, match=r"metrics.jsonl: has 2 bytes, but had \d+ at the checkpoint"
    ):
        RunLog(tmp_path, offsets=offsets, run_id="1a")
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_advantages_equal_hand_computed_values():
    np.testing.assert_allclose(
        group_advantages(np.array([1.0, 0.0, 0.0, 1.0, 0.0])),
        [0.6, -0.4, -0.4, 0.6, -0.4],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(group_advantages(np.ones(3), scale_by_std=True), 0.0)
    scaled = group_advantages(np.array([1.0, 0.0]), scale_by_std=True)
    half = np.sqrt(0.5)  # The sample standard deviation (with n - 1) is sqrt(0.5).
    np.testing.assert_allclose(scaled, [half, -half], rtol=1e-5)
    alone = group_advantages(np.array([1.0]), scale_by_std=True)
    np.testing.assert_array_equal(alone, 0.0)
