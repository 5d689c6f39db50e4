"""Runs a subset of the faults in `tools/inject_faults.py` with real processes, real signals and a full disk."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fault_harness import jobs
from fault_harness.comparison import differences, read_lines
from support.event_files import scalars
from support.short_run import JOB, checkpoint_steps, copy_unfinished
from trapo_jax.train import main as train

SEED = 20261124
SECRETS = {
    "HF_TOKEN": "hf_7f3a9c",
    "WANDB_API_KEY": "wb_7f3a9c",
    "AWS_SECRET_ACCESS_KEY": "aws_7f3a9c",
}


def start(folder, *more, **environment):
    return jobs.start(folder, (*JOB, *more), environment=environment)


def complete(folder, **environment):
    return jobs.complete(folder, JOB, environment=environment)


def wait_for_step(process, folder, step):
    """Waits until the step's record has been written."""
    record = f'"step": {step}, "kind": "train"'
    while not any(record in line for line in read_lines(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_stopped_three_times_equals_an_uninterrupted_one(finished_run, tmp_path, capsys):
    """The run is killed before its first checkpoint, killed again at a random time, and then terminated with SIGTERM.

    The test also checks that the run opens no listening sockets, stores no secrets, and writes to no other folders.
    """
    folder, rng = tmp_path / "run", random.Random(SEED)
    elsewhere = [tmp_path / name for name in ("home", "tmp")]
    for other in elsewhere:
        other.mkdir()
    environment = {**SECRETS, "HOME": str(elsewhere[0]), "TMPDIR": str(elsewhere[1])}
    moments = [(1, 0.0), (rng.randrange(4, 8), rng.uniform(0, 0.5))]
    for step, delay in moments:
        process = start(folder, **environment)
        wait_for_step(process, folder, step)
        time.sleep(delay)
        if step == 1:
            process.send_signal(signal.SIGSTOP)  # The suspended process still holds the lock.
            assert train([f"output_dir={folder}", *JOB]) == 2
            assert "another process is writing to it" in capsys.readouterr().err
        process.kill()
        process.communicate()
        print(f"seed {SEED}: {delay:.2f} s after step {step}: {jobs.progress(folder)}")
    process = start(folder, **environment)
    wait_for_step(process, folder, 9)
    assert not listening(process.pid)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    step = checkpoint_steps(folder)[-1]
    assert f"stopped after step {step}; the same command resumes it" in output
    assert f"resuming {folder} after step {step}\n" in complete(folder, **environment)
    assert differences(folder, finished_run[0]) == []
    model = Path("hf", "model.safetensors")
    assert (folder / model).read_bytes() == (finished_run[0] / model).read_bytes()
    assert [step for step, _ in scalars(folder, "loss/total")] == list(range(1, 13))
    assert not [path for other in elsewhere for path in other.rglob("*")]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [
        f for f in files for secret in SECRETS.values() if secret.encode() in f.read_bytes()
    ]


def listening(pid):
    """Returns the listening sockets of a process, according to /proc (Linux)."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    waiting = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    return waiting & {
        os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()
    }


def test_a_listening_socket_is_detected():
    assert not listening(os.getpid())
    with socket.create_server(("localhost", 0)):
        assert len(listening(os.getpid())) == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a separate 60 MB file system and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs requires root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_can_be_restored(
    finished_run, small_disk
):
    folder = small_disk / "run"
    step = copy_unfinished(finished_run[0], folder)
    with open(small_disk / "filler", "wb") as filler:  # Leaves less space than a checkpoint needs.
        filler.write(bytes(shutil.disk_usage(small_disk).free - 5 * 2**20))
    error = jobs.check_refusal(jobs.finish(start(folder)), 1)
    assert f"output_dir={folder}" in error
    assert "of disk space is left" in error
    assert checkpoint_steps(folder)[-1] == step
    (small_disk / "filler").unlink()
    assert f"after step {step}" in complete(folder)
    assert differences(folder, finished_run[0]) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_causes_a_one_line_error_and_no_data_loss(
    finished_run, small_disk
):
    """Orbax raises the error in its background threads, some of which then wait forever."""
    folder, filler = small_disk / "run", small_disk / "filler"
    step = copy_unfinished(finished_run[0], folder)
    program = (*jobs.STRIKE_AT, "Orbax's save", "1", str(filler))
    ended = jobs.finish(jobs.start(folder, JOB, program=program))
    line = jobs.check_refusal(ended, 1)
    assert "No space left on device; free some disk space" in line
    assert checkpoint_steps(folder)[-1] == step
    filler.unlink()
    assert f"after step {step}" in complete(folder)
    assert differences(folder, finished_run[0]) == []


@pytest.mark.slow
def test_a_stuck_step_terminates_the_process_with_a_stack_dump(tmp_path):
    process = start(tmp_path / "run", "limits.stuck_after_secs=0.01")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "no progress for limits.stuck_after_secs=0.01 seconds while" in output
    assert "most recent call first" in output
