"""Checks that a run survives any failure to write TensorBoard events, which only duplicate metrics.jsonl."""

import errno
import math
import time

import numpy as np
import pytest

from support.event_files import scalars
from trapo_jax.runs.loggers import RunLog, read_metrics
from trapo_jax.runs.tensorboard import TensorBoard
from trapo_jax.types import UserError


def test_scalars_are_read_by_tensorboard(tmp_path):
    board = TensorBoard(tmp_path / "tb", "1a")
    for step in (1, 2):
        board.scalar("loss/total", 0.5 * step, step)
    for step in (0, 127, 128, 2**40):
        board.scalar("ä" * 200, np.float32(-step), step)
    for value in (math.inf, 1e300):
        board.scalar("large", value, 1)
    board.close()
    assert scalars(tmp_path, "loss/total") == [(1, 0.5), (2, 1.0)]
    assert scalars(tmp_path, "ä" * 200) == [(n, -n) for n in (0, 127, 128, 2**40)]
    assert scalars(tmp_path, "large") == [(1, math.inf)] * 2


def test_a_clock_that_is_set_back_does_not_matter(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path / "tb", "1a")
    board.scalar("a", 1.0, 1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    for step in range(2, 40):
        board.scalar("a", 1.0, step)
    board.close()
    assert len(scalars(tmp_path, "a")) == 39


def test_a_failing_disk_causes_only_one_warning(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.0})

    def fail(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._trackers._trackers["tensorboard"]._writer, "write_event", fail)
    for step in (2, 3):
        log.metrics("train", step, {"a": 1.0, "b": 2.0})
    offsets = log.offsets()
    log.close()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert (
        f"warning: {tmp_path / 'tb'}: no more TensorBoard events will be written (No space"
        in warning
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    RunLog(tmp_path, offsets=offsets, run_id="1a").close()


@pytest.mark.parametrize("obstacle", ["file", "dangling link"])
def test_a_directory_that_cannot_be_created_causes_only_one_warning(obstacle, tmp_path, capsys):
    if obstacle == "file":
        (tmp_path / "tb").write_text("mine")
    else:
        (tmp_path / "tb").symlink_to(tmp_path / "absent" / "tb")
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.0})
    log.offsets()
    log.close()
    assert capsys.readouterr().err.count("\n") == 1
    assert [record["a"] for record in read_metrics(tmp_path)] == [1.0]


def test_a_deleted_directory_does_not_matter(tmp_path):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.0})
    offsets = log.offsets()
    for path in (tmp_path / "tb").iterdir():
        path.unlink()
    (tmp_path / "tb").rmdir()
    log.metrics("train", 2, {"a": 2.0})
    log.close()
    log = RunLog(tmp_path, offsets=offsets, run_id="1a")
    log.metrics("train", 2, {"a": 3.0})
    log.close()
    assert [record["a"] for record in read_metrics(tmp_path)] == [1.0, 3.0]
    assert scalars(tmp_path, "a") == [(2, 3.0)]


def test_damaged_metrics_are_detected_when_a_run_is_resumed(tmp_path):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    for step in (1, 2, 3):
        log.metrics("train", step, {"a": 1.0})
    offsets = log.offsets()
    log.close()
    content = bytearray((tmp_path / "metrics.jsonl").read_bytes())
    content[content.index(b"\n") + 1] = 0
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object; restore"):
        RunLog(tmp_path, offsets=offsets, run_id="1a")


def test_event_files_that_others_added_are_left_alone(tmp_path):
    log = RunLog(tmp_path, offsets=None, run_id="1a")
    log.metrics("train", 1, {"a": 1.0})
    offsets = log.offsets()
    log.metrics("train", 2, {"a": 1.0})
    log.close()
    (events,) = (tmp_path / "tb").iterdir()
    other_run = events.name.replace(".1a.", ".2b.")
    for name in (other_run, f"{events.name}.bak", "events.out.tfevents.1.host.2", "events.txt"):
        (tmp_path / "tb" / name).write_text("mine")
    RunLog(tmp_path, offsets=offsets, run_id="1a").close()
    mine = {p.name for p in (tmp_path / "tb").iterdir() if p.read_bytes() == b"mine"}
    assert mine == {
        other_run,
        f"{events.name}.bak",
        "events.out.tfevents.1.host.2",
        "events.txt",
    }
