"""A sample of `tools/inject_faults.py`: real processes, real signals, a real disk that is full, another mesh."""

import os
import random
import shutil
import signal
import subprocess
import time

import inject_faults
import pytest

from conftest import JOB  # isort: skip

SEED = 20261124


def test_killed_at_a_random_moment_and_resumed_is_equal_bit_for_bit(finished_run, tmp_path):
    folder = tmp_path / "run"
    after_secs = random.Random(SEED).uniform(8, 20)
    print(inject_faults.interrupt(folder, signal.SIGKILL, after_secs, JOB))
    inject_faults.complete(folder, JOB)
    assert inject_faults.differences(folder, finished_run[0]) == []


def wait_for_step(folder, step):
    while not any(
        f'"step": {step}, "kind": "train"' in line
        for line in inject_faults.read_lines(folder / "metrics.jsonl")
    ):
        time.sleep(0.01)


def test_interrupted_and_resumed_on_two_devices_is_equal_in_numbers(finished_run, tmp_path):
    """Each event of TensorBoard's files is there once, too."""
    folder = tmp_path / "run"
    process = inject_faults.start(folder, JOB)
    wait_for_step(folder, 4)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "the same command resumes it" in output
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    inject_faults.complete(folder, JOB, XLA_FLAGS=flags)
    tolerance = inject_faults.TOLERANCE_ON_ANOTHER_MESH
    assert inject_faults.differences(folder, finished_run[0], tolerance=tolerance) == []
    steps = [step for step, _ in scalars(folder, "loss/total")]
    assert steps == list(range(1, 13))


def scalars(folder, name):
    """(step, value) of one scalar in all event files, read as TensorBoard does."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted((folder / "tb").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            data = content[12 : 12 + length]
            assert masked_crc32c(data) == int.from_bytes(
                content[12 + length : 16 + length], "little"
            )
            event = event_pb2.Event.FromString(data)
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == name]
            content = content[16 + length :]
    return found


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 60 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_in_one_line_and_the_last_checkpoint_restores(
    finished_run, small_disk
):
    folder = small_disk / "run"
    process = inject_faults.start(folder, JOB)
    wait_for_step(folder, 4)
    with open(small_disk / "filler", "wb") as filler:  # but for less than a checkpoint needs
        filler.write(bytes(shutil.disk_usage(small_disk).free - 5 * 2**20))
    output = process.communicate()[0]
    assert process.returncode == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("error")]
    assert f"output_dir={folder}" in error
    assert "left on the disk" in error
    assert "Traceback" not in output
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["3"]
    (small_disk / "filler").unlink()
    assert "after step 3" in inject_faults.complete(folder, JOB)
    assert inject_faults.differences(folder, finished_run[0]) == []


def test_a_stuck_step_ends_the_process_with_a_stack_dump(tmp_path):
    folder = tmp_path / "run"
    process = inject_faults.start(folder, (*JOB, "limits.stuck_after_secs=0.01"))
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "nothing has happened for limits.stuck_after_secs=0.01 seconds while" in output
    assert "most recent call first" in output
