"""Tests that trackers receive the metrics written to metrics.jsonl, and that a run survives failing trackers."""

import json
import math
import sys
import time

import pytest

from support.commands import run_command, run_python
from support.short_run import TINY_JOB
from support.wandb_files import history
from trapo_jax.runs.loggers import RunLog, read_metrics
from trapo_jax.runs.trackers import SAMPLE_COLUMNS, find_tracker
from trapo_jax.types import UserError

RECORD = {**dict.fromkeys(SAMPLE_COLUMNS, 1), "prompt": "2+2?", "completion": "4", "tokens": {}}
MODULE = '''
import json, os

class Tracker:
    """Appends what it receives to a file in the run directory."""

    def __init__(self, run):
        self.path, self.run_id = run.folder / "received.jsonl", run.run_id
        self._write("config", run.config["train"]["num_steps"], 0)

    def scalars(self, values, step):
        if "fail_at" in os.environ and step == int(os.environ["fail_at"]):
            raise ConnectionError("no route to host")
        self._write("scalars", values, step)

    def samples(self, records, step):
        self._write("samples", sorted(records[0]), step)

    def flush(self):
        self._write("flush", None, 0)

    def close(self):
        self._write("close", None, 0)

    def _write(self, *call):
        with open(self.path, "a") as file:
            file.write(json.dumps([*call, self.run_id]) + "\\n")
'''


def write_series(folder, trackers, steps, offsets=None):
    """Logs a training step, an evaluation and samples for each step, and returns the offsets at the end."""
    log = RunLog(folder, offsets=offsets, run_id="1a2b", trackers=trackers, config={"seed": 0})
    for step in steps:
        log.samples([{**RECORD, "step": step}])
        log.metrics("train", step, {"loss/total": 0.5 * step, "policy/max": math.inf})
        log.evaluation("test", step, {"eval/accuracy": 0.1 * step}, {"correct": []})
    offsets = log.offsets()
    log.close()
    return offsets


def series_of_file(folder):
    """Returns {(name, step): value} for the numbers in metrics.jsonl, with the names that trackers get."""
    series = {}
    for record in read_metrics(folder):
        prefix = f"{record['split']}/" if "split" in record else ""
        for name, value in record.items():
            if name not in ("step", "kind", "split"):
                series[prefix + name, record["step"]] = math.inf if value is None else value
    return series


def test_wandb_receives_the_series_of_metrics_jsonl_also_from_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="requires the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    offsets = write_series(tmp_path, ["wandb"], (1, 2))
    time.sleep(1.1)  # The names of wandb's folders contain the time in seconds.
    write_series(tmp_path, ["wandb"], (3,), offsets)
    rows = history(tmp_path)
    received = {
        (name, step): float(value)
        for step, values in rows
        for name, value in values.items()
        if not name.startswith(("_", "samples"))
    }
    assert received == series_of_file(tmp_path)
    tables = [(step, v["samples.nrows"]) for step, v in rows if "samples.nrows" in v]
    assert tables == [(1, 1), (2, 1), (3, 1)]
    (ids,) = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    assert ids == "1a2b"


def test_trackio_receives_the_series_of_metrics_jsonl_also_from_a_resumed_run(tmp_path):
    """In a process of its own, because Trackio reads the name of its folder when it is imported."""
    pytest.importorskip("trackio", reason="requires the extra `trackio`")
    code = (
        "import json, pathlib, sys; sys.path.insert(0, 'tests')\n"
        "from runs.test_trackers import write_series\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "offsets = write_series(folder, ['trackio'], (1, 2))\n"
        "write_series(folder, ['trackio'], (3,), offsets)\n"
        "(name,) = SQLiteStorage.get_runs('trapo_jax')\n"
        "print(json.dumps([name, SQLiteStorage.get_logs('trapo_jax', name)]))\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    result = run_python("-c", code, folder, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert result.returncode == 0, result.stderr
    name, rows = json.loads(result.stdout)
    assert name == "run-1a2b"
    received = {
        (metric, row["step"]): float(value)
        for row in rows
        for metric, value in row.items()
        if metric not in ("step", "timestamp", "samples")
    }
    assert received == series_of_file(folder)
    assert [row["step"] for row in rows if "samples" in row] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_tracker_of_the_user_receives_a_run(fails, tmp_path, monkeypatch):
    if fails:
        monkeypatch.setenv("fail_at", "1")
    (tmp_path / "my_tracker.py").write_text(MODULE)
    result = run_command(
        "trapo_jax.train",
        *TINY_JOB,
        "output_dir=run",
        "trackers=[my_tracker:Tracker]",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in (tmp_path / "run" / "received.jsonl").open()]
    assert calls[0][:2] == ["config", 2]
    fields = [fields for kind, fields, *_ in calls if kind == "samples"]
    assert bool(fields) != fails
    assert all({*SAMPLE_COLUMNS} <= {*names} for names in fields)
    received = {
        (name, step): value
        for kind, values, step, _ in calls
        if kind == "scalars"
        for name, value in values.items()
    }
    expected = series_of_file(tmp_path / "run")
    if fails:
        assert result.stderr.count("no more metrics are sent") == 1
        assert "trackers=my_tracker:Tracker: no more" in result.stderr
        expected = {(name, step): value for (name, step), value in expected.items() if step == 0}
    else:
        assert [kind for kind, *_ in calls][-1] == "close"
    assert received == expected
    assert not (tmp_path / "run" / "tb").exists()


def test_a_tracker_that_cannot_start_causes_only_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_tracker.py").write_text("def make(run):\n    raise OSError('offline')\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_series(tmp_path / ".", ["broken_tracker:make", "tensorboard"], (1,))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "trackers=broken_tracker:make: no more metrics are sent (OSError: offline)" in error
    assert (tmp_path / "tb").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wand", "trackers=wand: no such tracker; did you mean wandb"),
        ("my_module:Missing", "trackers=my_module:Missing: "),
    ],
)
def test_an_unknown_tracker_is_rejected(name, message):
    with pytest.raises(UserError, match=message):
        find_tracker(name)


def test_no_tracker_starts_if_a_name_is_wrong(tmp_path):
    with pytest.raises(UserError, match="trackers=mlflow: no such tracker"):
        RunLog(tmp_path, offsets=None, run_id="1a", trackers=["tensorboard", "mlflow"])
    assert not (tmp_path / "tb").exists()


def test_the_error_for_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"wandb is not installed; pip install 'trapo-jax\[wandb\]'"
    ):
        RunLog(tmp_path, offsets=None, run_id="1a", trackers=["wandb"])
