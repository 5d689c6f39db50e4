"""Checkpoints: retention, cleanup and exact restoration; the run log is truncated at the restored offsets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trapo_jax.distributed.sharding import abstract_like
from trapo_jax.methods.advantages import group_advantages
from trapo_jax.runs.checkpoints import CheckpointStore, Retention
from trapo_jax.runs.loggers import RunLog, read_metrics
from trapo_jax.types import UserError

STATE = {"w": jnp.arange(6.0).reshape(2, 3) / 7, "n": jnp.int32(4)}
HOST = {"counters": {"a": 1}, "name": "x", "list": [1, 2.5, None]}


def restore(store, step):
    return store.restore(step, abstract_like(STATE, jax.tree.map(lambda x: x.sharding, STATE)))


def test_restores_exactly_what_was_saved(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    assert store.steps() == []
    store.save(3, STATE, HOST)
    state, host = restore(store, 3)
    assert host == HOST
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(STATE), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_keeps_the_newest_and_removes_leftovers(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(1, STATE, HOST)
    (tmp_path / "c" / "2.orbax-checkpoint-tmp").mkdir()  # left by an interrupted save
    assert store.steps() == [1]
    for step in (6, 9, 12):
        store.save(step, STATE, HOST)
    assert store.steps() == [9, 12]
    assert not (tmp_path / "c" / "2.orbax-checkpoint-tmp").exists()


def test_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "c", Retention(newest=1, best=1))
    for step, score in ((2, 0.1), (3, 0.9), (4, None), (5, 0.5), (6, 0.9), (7, None)):
        store.save(step, STATE, HOST, score=score)
    assert store.steps() == [6, 7]  # the later one of equal scores
    assert store.best_score() == 0.9
    store.save(7, STATE, HOST, score=1.0)  # saved again by a run that resumed from an earlier step
    assert store.steps() == [7]


def test_log_is_truncated_at_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, offsets=None)
    log.metrics("train", 1, {"a": 1.5})
    offsets = log.offsets()
    log.metrics("train", 2, {"a": float("nan")})
    log.samples([{"text": "\x1b[31m\nred"}])
    log.close()
    assert read_metrics(tmp_path)[1] == {"step": 2, "kind": "train", "a": None}
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
    log = RunLog(tmp_path, offsets=offsets)
    log.metrics("train", 2, {"a": 2.5})
    log.close()
    assert [r["a"] for r in read_metrics(tmp_path)] == [1.5, 2.5]
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert "\x1b" not in json.dumps(read_metrics(tmp_path))


def test_log_shorter_than_at_the_checkpoint_is_refused(tmp_path):
    log = RunLog(tmp_path, offsets=None)
    log.metrics("train", 1, {"a": 1.5})
    offsets = log.offsets()
    log.close()
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(
        UserError, match=r"metrics.jsonl: has 2 bytes, but had \d+ at the checkpoint"
    ):
        RunLog(tmp_path, offsets=offsets)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_advantages_equal_hand_computed_values():
    np.testing.assert_allclose(
        group_advantages(np.array([1.0, 0.0, 0.0, 1.0, 0.0])),
        [0.6, -0.4, -0.4, 0.6, -0.4],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(group_advantages(np.ones(3), scale_by_std=True), 0.0)
    scaled = group_advantages(np.array([1.0, 0.0]), scale_by_std=True)
    np.testing.assert_allclose(scaled, [1.0, -1.0], rtol=1e-5)
