"""Training with two processes on one machine equals training with one. If one hangs, the other exits with an error."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import inject_faults
from support.commands import REPOSITORY, run_command
from support.short_run import JOB
from trapo_jax.distributed.processes import SharedFlag, interrupt_together, join_processes
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.types import Interrupted, UserError

SIGNAL_AT = str(REPOSITORY / "tests" / "support" / "signal_at.py")


def start_two(folder, *arguments, commands=(("-m", "trapo_jax.train"),) * 2):
    """Starts two processes of the job with these arguments of Python."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command, f"output_dir={folder}", *JOB, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(process_id),
            },
        )
        for process_id, command in enumerate(commands)
    ]


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def wait_for(processes, path, text=""):
    """Waits until the folder exists, or a file that contains the text."""
    while not (path.exists() and (path.is_dir() or text in path.read_text())):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.05)


def stop_one(folder, activity, step):
    """Sends SIGTERM to process 1, while both sample, and returns the output of process 0."""
    signalled = (SIGNAL_AT, activity, step, "1", str(int(signal.SIGTERM)))
    main, other = finish(start_two(folder, commands=(("-m", "trapo_jax.train"), signalled)))
    assert "stopped" not in other  # only process 0 prints this
    return main


@pytest.mark.slow
def test_two_processes_stop_together_train_like_one_and_one_can_continue(finished_run, tmp_path):
    """Process 1 is terminated twice, and then hangs; a single process finishes the run.

    Neither process waits for the other in a collective operation that the other never reaches.
    """
    folder = tmp_path / "run"
    output = stop_one(folder, "evaluating test", "0")
    assert "stopped before the first step; the same command resumes it" in output
    assert read_metrics(folder) == []
    output = stop_one(folder, "step 3", "3")
    assert "stopped after step 2; the same command resumes it" in output
    records = [(r["kind"], r["step"]) for r in read_metrics(folder)]
    assert records == [("eval", 0), ("train", 1), ("train", 2)]

    processes = start_two(folder, "checkpoint.every=1", "limits.stuck_after_secs=25")
    wait_for(processes, folder / "checkpoints" / "4")
    processes[1].send_signal(signal.SIGSTOP)
    output = processes[0].communicate()[0]
    processes[1].kill()
    processes[1].wait()
    assert processes[0].returncode == 1
    assert f"resuming {folder} after step 2, checkpoint.every=1 (was 3)" in output
    assert "no progress for limits.stuck_after_secs=25 seconds while" in output
    assert "another process may have died" in output

    result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB)
    assert re.search("resuming .* after step [4-9],", result.stdout), result.stderr
    tolerance = inject_faults.TOLERANCE_ON_ANOTHER_MESH
    assert inject_faults.differences(folder, finished_run[0], tolerance=tolerance) == []
    records = read_metrics(folder)
    assert max(record.get("policy/logprob_gap_max", 0) for record in records) < 1e-4
    assert (folder / "samples.jsonl").read_text().count("\n") == 12 * 4 * 8
    assert (folder / "hf" / "model.safetensors").is_file()


def test_work_is_interrupted_together():
    def interrupted():
        raise Interrupted

    assert interrupt_together(lambda: 3) == 3
    with pytest.raises(Interrupted):
        interrupt_together(interrupted)
    with pytest.raises(ZeroDivisionError):
        interrupt_together(lambda: 1 / 0)


def test_a_shared_flag_of_one_process_needs_no_other():
    flag = SharedFlag("test")
    assert not flag.is_set
    flag.set()
    assert flag.is_set
    flag.close()
    assert not SharedFlag("test").is_set


def test_half_a_description_of_the_job_is_refused():
    with pytest.raises(UserError, match="PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS;"):
        join_processes({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})


def test_a_missing_device_is_a_one_line_error():
    script = "from trapo_jax.train import main; import sys; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        cwd=REPOSITORY,
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "error: JAX finds no device, JAX_PLATFORMS=cuda" in line
    assert "Traceback" not in result.stderr


def test_one_process_opens_no_port():
    for environment in (
        {},
        {"SLURM_NTASKS": "4"},  # inside an allocation, but not started by srun
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ):
        join_processes(environment)  # otherwise, this would wait for a coordinator
