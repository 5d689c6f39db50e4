"""Tests that two processes train like one, and that if one of them dies or fails, the other exits too."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from fault_harness.comparison import TOLERANCE_ON_ANOTHER_MESH, differences
from support.commands import REPOSITORY, run_command
from support.short_run import JOB
from trapo_jax.data import card_shuffles_splits
from trapo_jax.distributed import launch
from trapo_jax.distributed.launch import _local_device_ids, check_equal, join_processes
from trapo_jax.distributed.processes import SharedFlag, interrupt_together
from trapo_jax.runs.loggers import read_metrics
from trapo_jax.types import Interrupted, UserError

OTHER_HAS_DIED = "error: another process of the job has died or cannot be reached"
PEER = str(REPOSITORY / "tests" / "support" / "peer.py")
SIGNAL_AT = str(REPOSITORY / "tests" / "support" / "signal_at.py")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# Each function below returns the environment variables that a launcher sets for the process with the given number.


def by_hand(port, number):
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }


def by_srun(port, number):
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }


def by_mpirun(port, number):
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }


def on_gke(port, number):
    return {
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_COORDINATOR_PORT": str(port),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_WORKER_ID": str(number),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }


def start_two(*arguments, launcher=by_hand, commands=(("-m", "trapo_jax.train"),) * 2, **options):
    """Starts the two processes of a job, and returns them.

    Args:
      arguments: command-line arguments for both processes.
      launcher: function that maps a port and a process's number to environment variables.
      commands: arguments for the Python interpreter of each process, placed before `arguments`.
      options: keyword arguments for `subprocess.Popen`.
    """
    port = free_port()
    inherited = {k: v for k, v in os.environ.items() if k != "TPU_WORKER_HOSTNAMES"}
    options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return [
        subprocess.Popen(
            [sys.executable, *command, *arguments],
            text=True,
            env={**inherited, "JAX_PLATFORMS": "cpu", **launcher(port, number)},
            **options,
        )
        for number, command in enumerate(commands)
    ]


def outputs_of(processes, returncodes):
    """Waits for the processes to exit, checks their return codes, and returns their outputs."""
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == returncodes, outputs
    return outputs


def errors_of(output):
    """Returns the error lines of an output, after checking that it contains no stack trace."""
    lines = output.splitlines()
    noise = ("Traceback", "*** ", "    @", "E0", "E1", "F0", "F1", "terminate called")
    assert not [line for line in lines if line.startswith(noise)], output
    return [line for line in lines if line.startswith("error")]


def wait_for(processes, path, text=""):
    """Waits until `path` exists and is either a folder or a file that contains `text`."""
    while not (path.exists() and (path.is_dir() or text in path.read_text())):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_train_like_one_and_a_single_process_can_resume_their_run(
    finished_run, tmp_path
):
    """Two processes run a job until one is terminated, then resume it until one is killed. One process finishes it."""
    folder = tmp_path / "run"
    job = (f"output_dir={folder}", *JOB)
    processes = start_two(*job)
    wait_for(processes, folder / "metrics.jsonl", '"step": 1, "kind": "train"')
    processes[1].send_signal(signal.SIGTERM)
    main, other = outputs_of(processes, [0, 0])
    first = int(re.search(r"stopped after step (\d+); the same command resumes it", main)[1])
    assert "stopped after step" not in other  # only process 0 prints this

    processes = start_two(*job, "checkpoint.every=1", launcher=by_srun)
    wait_for(processes, folder / "checkpoints" / str(first + 2))
    processes[0].kill()
    main, other = outputs_of(processes, [-signal.SIGKILL, 1])
    assert f"resuming {folder} after step {first}, checkpoint.every=1 (was 3)" in main
    (error,) = errors_of(other)
    assert OTHER_HAS_DIED in error

    result = run_command("trapo_jax.train", *job)
    assert re.search("resuming .* after step [2-9],", result.stdout), result.stderr
    tolerance = TOLERANCE_ON_ANOTHER_MESH
    assert differences(folder, finished_run[0], tolerance=tolerance) == []
    records = read_metrics(folder)
    assert max(record.get("policy/logprob_gap_max", 0) for record in records) < 1e-4
    assert (folder / "samples.jsonl").read_text().count("\n") == 12 * 4 * 8
    assert (folder / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activity", "step", "stopped", "launcher"),
    [
        ("evaluating test", "0", "before the first step", by_hand),
        ("step 3", "3", "after step 2", by_mpirun),
    ],
)
def test_a_signal_to_one_of_two_processes_stops_both_while_they_sample(
    tmp_path, activity, step, stopped, launcher
):
    """Only process 1 receives the signal. No process waits in a collective operation that the other never joins."""
    folder = tmp_path / "run"
    signalled = (SIGNAL_AT, activity, step, "1", str(int(signal.SIGTERM)))
    commands = (("-m", "trapo_jax.train"), signalled)
    job = (f"output_dir={folder}", *JOB)
    main, _ = outputs_of(start_two(*job, commands=commands, launcher=launcher), [0, 0])
    assert f"stopped {stopped}; the same command resumes it" in main
    records = [(r["kind"], r["step"]) for r in read_metrics(folder)]
    assert records == [("eval", 0), ("train", 1), ("train", 2)][: 0 if step == "0" else None]


@pytest.mark.slow
def test_processes_that_were_started_differently_refuse_to_run_together(tmp_path):
    """Both processes report the same differences, and nothing is written."""
    train = ("-m", "trapo_jax.train")
    commands = (train, (*train, "seed=1", "method.name=grpo", "train.learning_rate=1e-4"))
    processes = start_two(f"output_dir={tmp_path / 'run'}", commands=commands)
    main, other = outputs_of(processes, [2, 2])
    (error,) = errors_of(main)
    assert errors_of(other) == [error]
    assert "differ in seed=0 on process 0, 1 on process 1; " in error
    assert 'method.name="trapo" on process 0, "grpo" on process 1; ' in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_different_data_refuse_to_run_together(tmp_path):
    """The processes are started with the same relative path, but in different folders."""
    rows = card_shuffles_splits(seed=3, num_train=20, num_validation=1, num_test=1)["train"]
    lines = [json.dumps({"question": row.prompt, "answer": row.answer}) + "\n" for row in rows]
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "problems.jsonl").write_text("".join(lines[number:]))
    job = (f"output_dir={tmp_path / 'run'}", "data.train_files=[problems.jsonl]")
    job += ("model.path=card_shuffles_tiny", "method.name=grpo", "data.template=none")
    job += ("rewards.functions=[card_shuffles]",)
    enter = (
        "import os, sys\n"
        "from trapo_jax.train import main, run_and_exit\n"
        "os.chdir(sys.argv.pop(1))\n"
        "run_and_exit(main)"
    )
    commands = [("-c", enter, str(tmp_path / name)) for name in ("a", "b")]
    processes = start_two(*job, commands=commands)
    main, other = outputs_of(processes, [2, 2])
    (error,) = errors_of(main)
    assert errors_of(other) == [error]
    assert "differ in the train problems=" in error


@pytest.fixture
def tpu_vm():
    """Yields a launcher that emulates TPU VMs; a fake metadata server has a separate address for each process."""

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _, number, *_, key = self.path.split("/")
            attributes = {
                "agent-worker-number": number,
                "worker-network-endpoints": "localhost,localhost",
                "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'",
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[key].encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda port, number: {
            "JAX_FORCE_TPU_INIT": "1",
            "JAX_COORDINATOR_PORT": str(port),
            "GCE_METADATA_IP": f"localhost:{server.server_port}/{number}",
        }
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_if_one_process_fails_the_other_exits_and_prints_the_reason(failing, tpu_vm):
    launcher = (on_gke, tpu_vm)[failing]
    processes = start_two(str(failing), "fail", commands=[(PEER,)] * 2, launcher=launcher)
    outputs = outputs_of(processes, [2, 1] if failing == 0 else [1, 2])
    assert all("processes: [0, 1]" in output for output in outputs)
    assert errors_of(outputs[failing]) == ["error: train.parquet: no such file"]
    reason = f"error: process {failing} of the job failed: train.parquet: no such file"
    assert errors_of(outputs[1 - failing]) == [reason]


@pytest.mark.slow
def test_if_one_process_is_killed_the_other_exits_with_a_one_line_error():
    """Process 1 is killed while process 0 waits in a collective operation. Another test kills process 0."""
    processes = start_two("1", "die", commands=[(PEER,)] * 2)
    main, _ = outputs_of(processes, [1, -signal.SIGKILL])
    (error,) = errors_of(main)
    assert OTHER_HAS_DIED in error


def test_work_is_interrupted_together():
    def interrupted():
        raise Interrupted

    assert interrupt_together(lambda: 3) == 3
    with pytest.raises(Interrupted):
        interrupt_together(interrupted)
    with pytest.raises(ZeroDivisionError):
        interrupt_together(lambda: 1 / 0)


def test_a_shared_flag_works_in_a_single_process():
    flag = SharedFlag("test")
    assert not flag.is_set
    flag.set()
    assert flag.is_set
    flag.close()
    assert not SharedFlag("test").is_set


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "but not JAX_COORDINATOR_ADDRESS;"),
        (by_hand("port", 0), "JAX_COORDINATOR_ADDRESS=localhost:port: set it to HOST:PORT"),
        (by_hand(1, "first"), "JAX_PROCESS_ID='first': not a whole number"),
        (
            by_hand(1, 2),
            "JAX_PROCESS_ID=2: with JAX_NUM_PROCESSES=2, set it to a number from 0 to 1",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4: .* start it with srun"),
        ({"SLURM_NTASKS": "4(x2)", "SLURM_PROCID": "0"}, "SLURM_NTASKS='4.x2.': not a whole"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: this process is one of 2"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: .* set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ({**by_srun("7000", 0), "SLURM_JOB_ID": "seven", "JAX_COORDINATOR_PORT": ""}, "=seven"),
        ({**by_mpirun(1, "first")}, "OMPI_COMM_WORLD_RANK=first"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, r"TPU_WORKER_HOSTNAMES=t0,t1: .*trapo_jax\[tpu\]"),
    ],
)
def test_processes_that_cannot_find_each_other_cause_a_one_line_error(
    environment, message, monkeypatch
):
    monkeypatch.setattr(launch, "report_abort", lambda line: None)  # This process must continue.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        join_processes({}, dead_after_secs=1)
    assert "\n" not in str(error.value)


def test_processes_that_jax_discovers_by_their_devices_need_a_coordinator(monkeypatch):
    """On a TPU pod, JAX finds the devices of all hosts even without a coordinator."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of 4, but JAX cannot find their coordinator"):
        join_processes({}, dead_after_secs=1)


def test_one_process_per_host_uses_all_devices_of_the_host(monkeypatch):
    """By default, JAX assigns one device to each process that srun or mpirun started."""
    for launcher in (by_srun, by_mpirun):
        with monkeypatch.context() as context:
            for name, value in launcher(1, 0).items():
                context.setenv(name, value)
            assert _local_device_ids() == []
            context.setenv("SLURM_NTASKS", "8")
            context.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
            assert _local_device_ids() is None
            context.setenv("SLURM_NTASKS", "2")
            context.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
            assert _local_device_ids() is None


def test_differences_are_reported_with_the_value_of_each_process():
    same = {"seed": 0, "data.train_files": ["x" * 100], "lengths": {"a": 1}}
    check_equal([same] * 4, "")
    other = {**same, "seed": 1, "new": None}
    with pytest.raises(UserError) as error:
        check_equal([same, same, other, same], "start them alike")
    assert str(error.value) == (
        "the processes of the job differ in seed=0 on process 0 and 2 others, 1 on process 2; "
        "new=absent on process 0 and 2 others, null on process 2; start them alike"
    )
    many = [{f"field{i}": [value] * 100 for i in range(9)} for value in (1, 2)]
    with pytest.raises(UserError, match=r"\.\.\. on process 1 and 6 more; alike$") as error:
        check_equal(many, "alike")
    assert len(str(error.value)) < 600


@pytest.mark.slow
def test_a_missing_device_causes_a_one_line_error():
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
    assert "error: JAX finds no device for JAX_PLATFORMS=cuda" in line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "4"},  # a shell in a Slurm allocation
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_opens_no_port(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_processes({}, dead_after_secs=1)  # otherwise, this would wait for a coordinator
    assert not jax.distributed.is_initialized()
