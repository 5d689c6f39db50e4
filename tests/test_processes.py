"""Two processes on this machine train as one does; if one hangs, the other ends with a message."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from trapo_jax.metrics import read_metrics
from trapo_jax.processes import join_processes
from trapo_jax.types import UserError

from conftest import CACHE_ENV, JOB, REPOSITORY  # isort: skip


def start_two(folder, *arguments):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trapo_jax.train", f"output_dir={folder}", *JOB, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **CACHE_ENV,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(process_id),
            },
        )
        for process_id in range(2)
    ]


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


# Of one process's devices, of rounding, or of how long the clock ran; the rest is the same for any number.
OWN = ("time/", "sampling/slot_utilization", "batch/pad", "batch/balance", "policy/logprob_gap")


def test_two_processes_train_as_one(finished_run, tmp_path):
    """Twelve steps of the default job, killed and resumed on the way."""
    folder = tmp_path / "two"
    processes = start_two(folder)
    while not (folder / "checkpoints" / "3").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    main, other = finish(start_two(folder))
    assert re.search("resuming .* after step [3-9]", main)
    assert "step 12: test accuracy" in main
    assert "step 12" not in other  # process 0 alone tells
    ours, theirs = read_metrics(folder), read_metrics(finished_run[0])
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for record, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            if name.startswith(OWN):
                continue
            if isinstance(value, float):
                np.testing.assert_allclose(record[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                assert record[name] == value, name
        assert record.get("policy/logprob_gap_max", 0) < 1e-4
    assert (folder / "samples.jsonl").read_text().count("\n") == 12 * 4 * 8
    assert (folder / "hf" / "model.safetensors").is_file()


def test_a_process_that_hangs_ends_the_other_with_a_message(tmp_path):
    processes = start_two(tmp_path / "run", "limits.stuck_after_secs=15")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 1, "kind": "train"' in metrics.read_text()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGSTOP)
    output = processes[0].communicate(timeout=120)[0]
    processes[1].kill()
    processes[1].wait()
    assert processes[0].returncode == 1
    assert "nothing has happened for limits.stuck_after_secs=15 seconds while" in output
    assert "maybe because another process died" in output


def test_half_a_description_of_the_job_is_refused():
    with pytest.raises(UserError, match="PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS;"):
        join_processes({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})


def test_one_process_opens_no_port():
    for environment in (
        {},
        {"SLURM_NTASKS": "4"},  # inside an allocation, but not started by srun
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ):
        join_processes(environment)  # would look for a coordinator, and wait
