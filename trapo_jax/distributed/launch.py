"""Starts a job: connects its processes, one per host, and checks that they were started with the same settings.

JAX detects the processes of a TPU slice, including on GKE, and processes started by `srun` or `mpirun`. In other cases,
the environment variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` describe the processes.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import (  # JAX has no public API for the detected cluster or the key-value store.
    clusters,
    distributed,
)

from trapo_jax.distributed.failures import report_abort
from trapo_jax.distributed.log_level import HOST_LISTS
from trapo_jax.types import UserError

ADDRESS, COUNT, ID = BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Environment variables that launchers set and JAX reads.
DETECTED_FROM = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    *(*HOST_LISTS, "TPU_WORKER_ID", "JAX_COORDINATOR_PORT"),
)
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
JOIN_SECS = 300  # Maximum time between the starts of the first and the last process.
# Maximum time that a process waits for the settings of the others, once all have joined.
EXCHANGE_SECS = 60
MAX_NAMED = 3  # Maximum number of differing settings in an error message.
MAX_VALUE_CHARS = 60
SETTINGS = "trapo_jax/settings"


def join_processes(settings: Mapping[str, Any], *, dead_after_secs: float) -> None:
    """Initializes `jax.distributed` if the job has several processes. Must be called before JAX devices are used.

    A job with one process opens no port. If `jax.distributed` has been initialized already, only the settings are
    compared.

    Args:
      settings: JSON-serializable values, keyed by name, that must be the same in all processes.
      dead_after_secs: time after which an unresponsive process is considered dead, and all other processes exit.

    Raises:
      UserError: if the settings differ; if a launcher started several processes, but they cannot find each other; if
        the launcher's environment variables are malformed; or if JAX finds no device.
    """
    if not jax.distributed.is_initialized():
        _initialize(dead_after_secs)
    if jax.distributed.is_initialized():
        check_equal(_exchange(settings), "start the same command with the same files on every host")
    try:
        num_processes = jax.process_count()
    # JAX raises an AssertionError if the platform's plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS") or "any"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={platforms}{reason and f' ({reason})'}; unset it to "
            "use the available devices"
        ) from error
    if num_processes > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this process is one of {num_processes}, but JAX cannot find their coordinator; set {', '.join(BY_HAND)}"
        )


def _initialize(dead_after_secs: float) -> None:
    """Initializes `jax.distributed` if this process is one of several."""
    address, num_processes, process_id = _described_by_hand()
    if num_processes is None and _detected_count() == 1:
        _check_alone()
        return
    described = ", ".join(f"{x}={os.environ[x]}" for x in DETECTED_FROM if x in os.environ)
    where = address or f"the coordinator that JAX detects ({described or 'TPU metadata'})"
    report_abort(
        f"not all processes of the job connected to {where} within {JOIN_SECS} s, or two of them have the same number; "
        "start every process exactly once, and check the output of the others"
    )
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            local_device_ids=_local_device_ids(),
            initialization_timeout=JOIN_SECS,
            heartbeat_timeout_seconds=max(1, round(dead_after_secs)),
        )
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot join the other processes at {where}: {reason}") from error
    report_abort(
        "another process of the job has died or cannot be reached; see its output, then restart all processes to "
        "resume from the newest checkpoint (with TF_CPP_MIN_LOG_LEVEL=0, JAX logs why it ended this process)"
    )


def _described_by_hand() -> tuple[str | None, int | None, int | None]:
    """Returns the coordinator's address, the number of processes, and this process's number; all None if not set."""
    given = [name for name in BY_HAND if name in os.environ]
    if not given:
        return None, None, None
    if missing := [name for name in BY_HAND if name not in given]:
        raise UserError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; set all three or none of them"
        )
    address, count, index = os.environ[ADDRESS], _integer(COUNT), _integer(ID)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS}={address}: set it to HOST:PORT, the address of process 0")
    if not 0 <= index < count:
        raise UserError(
            f"{ID}={index}: with {COUNT}={count}, set it to a number from 0 to {count - 1}"
        )
    return address, count, index


def _detected_count() -> int:
    """Returns the number of processes in the job that JAX detects; 1 if it detects none."""
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    with warnings.catch_warnings():
        # In a Kubernetes pod, JAX warns if the Kubernetes client is not installed.
        warnings.simplefilter("ignore")
        # To detect a cluster, JAX may query cloud servers, whose client libraries raise exceptions of their own.
        try:
            return next((x.get_process_count() for x in kinds if x.is_env_present()), 1)
        except Exception:
            return 1


def _check_alone() -> None:
    """Checks that no launcher has started other processes that JAX does not detect."""
    for variable, num_processes, remedy in _launched():
        if num_processes > 1:
            raise UserError(
                f"{variable}={os.environ[variable]}: this process is one of {num_processes}, but JAX cannot find the "
                f"others; {remedy}, or set {', '.join(BY_HAND)}"
            )


def _launched() -> Iterator[tuple[str, int, str]]:
    """Yields three values for each detected launcher.

    They are the environment variable with the number of processes, that number, and what to do if JAX finds only one
    process.
    """
    name = "SLURM_NTASKS"
    # In a shell inside an allocation, SLURM_PROCID is not set.
    if name in os.environ and "SLURM_PROCID" in os.environ:
        yield (
            name,
            _integer(name),
            "start it with srun, or unset the variable if it is the only process",
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in os.environ:
            yield name, _integer(name), "start only one process if it should run alone"
    for name in HOST_LISTS:
        if name in os.environ:
            hosts = os.environ[name].split(",")
            yield name, len(hosts), "install trapo_jax[tpu] on a host with a TPU"


def _local_device_ids() -> list[int] | None:
    """Returns [], meaning all devices, if this is the only process on its host; None for JAX's default.

    JAX's default for processes started by srun or mpirun is one device, even if there is only one process per host.
    """
    if LOCAL_DEVICES in os.environ:
        return None
    tasks, nodes, local = "SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"
    if tasks in os.environ and nodes in os.environ:
        return [] if _integer(tasks) == _integer(nodes) else None
    return [] if local in os.environ and _integer(local) == 1 else None


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(f"{name}={os.environ[name]!r:.100}: not a whole number") from error


def _exchange(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings of all processes.

    They are exchanged through the coordinator, not with a collective, because the devices of the processes may also
    differ.

    Raises:
      UserError: if a process does not send its settings.
    """
    state = distributed.global_state
    client: Any = state.client
    text = json.dumps(settings, default=str)
    try:
        client.key_value_set(f"{SETTINGS}/{state.process_id}", text, allow_overwrite=True)
        client.wait_at_barrier(f"{SETTINGS}/sent", 1000 * EXCHANGE_SECS)
        received = dict(client.key_value_dir_get(SETTINGS))
        # No process may exit before all have received the settings, because the coordinator exits with process 0.
        client.wait_at_barrier(f"{SETTINGS}/received", 1000 * EXCHANGE_SECS)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the other processes of the job did not send their settings within {EXCHANGE_SECS} s; start the same "
            "command with the same version of trapo_jax on every host"
        ) from error
    return [json.loads(received[f"{SETTINGS}/{process}"]) for process in range(state.num_processes)]


def check_equal(by_process: Sequence[Mapping[str, Any]], remedy: str) -> None:
    """Checks that the values of all processes are equal.

    Args:
      by_process: the values of every process, keyed by name.
      remedy: what to do if they differ, for the error message.

    Raises:
      UserError: if they differ; the message names each difference and its values.
    """
    names = dict.fromkeys(name for values in by_process for name in values)
    lines = []
    for name in names:
        processes: dict[str, list[int]] = {}
        for process, values in enumerate(by_process):
            text = json.dumps(values[name], ensure_ascii=False) if name in values else "absent"
            processes.setdefault(text, []).append(process)
        if len(processes) > 1:
            lines.append(f"{name}={', '.join(map(_describe, processes.items()))}")
    if lines:
        rest = f" and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else ""
        raise UserError(
            f"the processes of the job differ in {'; '.join(lines[:MAX_NAMED])}{rest}; {remedy}"
        )


def _describe(item: tuple[str, Sequence[int]]) -> str:
    text, processes = item
    if len(text) > MAX_VALUE_CHARS:
        text = text[: MAX_VALUE_CHARS - 3] + "..."
    others = f" and {len(processes) - 1} others" if len(processes) > 1 else ""
    return f"{text} on process {processes[0]}{others}"
