"""Tests the execution of runs, with a small fake in place of `trapo_jax.train`."""

import itertools
import os

import pytest

from support.comparisons import make_grid
from trapo_jax.comparison import experiment, run_pool
from trapo_jax.comparison.experiment import core_limits
from trapo_jax.comparison.grid import Trial
from trapo_jax.comparison.run_pool import execute_runs
from trapo_jax.types import Interrupted, UserError

TRAINER = """
import pathlib, re, signal, sys, time
text = pathlib.Path(sys.argv[2]).read_text()
folder = pathlib.Path(re.search("output_dir: (.*)", text)[1])
seed = int(re.search("^seed: (.*)", text, re.M)[1])
folder.mkdir(exist_ok=True)
(folder / "start").write_text(str(time.time_ns()))
(folder / "config.yaml").write_text(text)
with open(folder / "started", "a") as file:
    file.write("x")
if seed == 7:
    def save(*_):
        (folder / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGINT, save)
    (folder / "ready").touch()
    time.sleep(60)
if seed == 1 and not (folder / "repaired").exists():
    sys.exit("error: <b>train.learning_rate</b>")
num_steps = re.search("num_steps: (.*)", text)[1]
(folder / "metrics.jsonl").write_text('{"step": %s, "kind": "train", "budget/progress": 1}\\n' % num_steps)
(folder / "summary.json").write_text("{}")
(folder / "end").write_text(str(time.time_ns()))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Replaces `trapo_jax.train` with a fake that fails when run with seed 1 and blocks when run with seed 7.

    Returns a folder for runs.
    """
    package = tmp_path / "fake" / "trapo_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(TRAINER)
    monkeypatch.chdir(package.parent)
    monkeypatch.setattr(run_pool, "POLL_SECS", 0.02)
    # The fake writes no evaluations.
    monkeypatch.setattr(run_pool, "collect_result", lambda run: None)
    return tmp_path


def started(runs):
    return [len((run.folder / "started").read_text()) for run in runs]


def test_only_a_failed_run_is_reported_and_repeated(trainer):
    runs = make_grid(trainer, methods=("trapo",)).final_runs([Trial("trapo")])
    lines = []
    (failure,) = execute_runs(runs, jobs=2, environment=os.environ, say=lines.append)
    assert failure.run is runs[1]
    assert failure.reason.startswith("error: <b>train.learning_rate</b> (exit code 1; ")
    assert "2 of 3 runs complete, 0 active, 0 pending; " in lines[-1]
    assert " runs per hour, " in lines[-1]
    assert any(line.startswith(f"trapo, seed 1 failed: {failure.reason}; ") for line in lines)
    (runs[1].folder / "repaired").touch()
    assert execute_runs(runs, jobs=2, environment=os.environ, say=lines.append) == []
    assert started(runs) == [1, 2, 1]


def test_no_more_runs_than_jobs_are_active(trainer):
    runs = make_grid(trainer, methods=("trapo", "grpo", "sft"), seeds=1).final_runs(
        [Trial("trapo"), Trial("grpo"), Trial("sft")]
    )
    assert execute_runs(runs, jobs=1, environment=os.environ, say=print) == []
    read = lambda run, name: int((run.folder / name).read_text())
    for first, second in itertools.pairwise(runs):
        assert read(first, "end") < read(second, "start")


def test_runs_share_the_cores(monkeypatch):
    monkeypatch.setattr(experiment, "num_cores", lambda: 8)
    assert core_limits(3) == {"NPROC": "2", "OMP_NUM_THREADS": "2"}
    assert core_limits(16)["NPROC"] == "1"


def test_a_directory_with_another_run_is_rejected_before_anything_starts(trainer):
    runs = make_grid(trainer, methods=("trapo",), seeds=1).final_runs([Trial("trapo")])
    execute_runs(runs, jobs=1, environment=os.environ, say=print)
    others = make_grid(trainer, methods=("trapo",), seeds=2, budget=30.0)
    with pytest.raises(UserError, match=r"contains a run with train\.num_steps=20, not 30"):
        execute_runs(others.final_runs([Trial("trapo")]), jobs=1, environment=os.environ, say=print)
    assert started(runs) == [1]


def test_a_complete_run_is_extended_to_more_steps(trainer):
    options = {"methods": ("trapo",), "seeds": 1, "overrides": (("train.decay_start", "1"),)}
    for budget in (20.0, 30.0, 30.0):
        runs = make_grid(trainer, budget=budget, **options).final_runs([Trial("trapo")])
        assert execute_runs(runs, jobs=1, environment=os.environ, say=print) == []
    assert started(runs) == [2]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, BrokenPipeError])
def test_active_runs_save_a_checkpoint_when_the_comparison_is_stopped(
    trainer, monkeypatch, exception
):
    (run,) = make_grid(trainer, methods=("trapo",), seeds=8).final_runs([Trial("trapo")])[7:]

    def interrupt_once_ready(_):
        if (run.folder / "ready").exists():
            raise exception

    monkeypatch.setattr(run_pool.time, "sleep", interrupt_once_ready)
    with pytest.raises(Interrupted if exception is KeyboardInterrupt else exception):
        execute_runs([run], jobs=1, environment=os.environ, say=print)
    assert (run.folder / "saved").exists()
