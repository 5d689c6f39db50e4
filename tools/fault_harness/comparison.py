"""Compares two runs bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from trapo_jax.runs.checkpoints import EXPIRED
from trapo_jax.runs.directory import CHECKPOINTS, EVALUATIONS, EXPORT, METRICS, SAMPLES, SUMMARY
from trapo_jax.runs.manifests import MANIFEST

WEIGHTS = "model.safetensors"
TOLERANCE_ON_ANOTHER_MESH = 1e-5


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file, except for an incomplete last line; [] if the file does not exist."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def differences(ours: Path, theirs: Path, *, tolerance: float = 0.0) -> list[str]:
    """Returns the names of all files, arrays and fields that differ between two complete runs.

    Args:
      ours, theirs: run directories.
      tolerance: relative and absolute tolerance for numbers; 0 requires bitwise equality.
    """
    found = []
    records, their_records = (
        [_untimed(line) for line in read_lines(folder / METRICS)] for folder in (ours, theirs)
    )
    if not _same_records(records, their_records, tolerance):
        found.append(METRICS)
    if tolerance == 0 and _bytes(ours, SAMPLES) != _bytes(theirs, SAMPLES):
        found.append(SAMPLES)
    if tolerance == 0:
        found += [name for name in _results(theirs) if _bytes(ours, name) != _bytes(theirs, name)]
    last = max(int(path.name) for path in (theirs / CHECKPOINTS).iterdir())
    found += [path.parent.name for path in (ours / CHECKPOINTS).glob(f"*{EXPIRED}/{MANIFEST}")]
    state, host = read_checkpoint(ours, last)
    their_state, their_host = read_checkpoint(theirs, last)
    if _without_seconds(host["usage"]) != _without_seconds(their_host["usage"]):
        found.append("usage")
    if host["method_state"] != their_host["method_state"]:
        found.append("method_state")
    for name, leaf in their_state.items():
        if not _same_array(state[name], leaf, tolerance):
            found.append(name)
    return found


def read_checkpoint(
    folder: Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a checkpoint (by default, the last one), keyed by path, and its host state."""
    import jax

    registry = ocp.handlers.local_registry()
    # The same handler as in CheckpointStore.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")
    context = ocp.Context()
    context.checkpointables.registry = registry
    steps = [path.name for path in (folder / CHECKPOINTS).iterdir() if path.name.isdecimal()]
    path = str((folder / CHECKPOINTS / str(step or max(steps, key=int))).absolute())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with context:
        shapes = ocp.checkpointables_metadata(path).metadata["state"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        loaded = ocp.load_checkpointables(path, {"state": abstract, "host": None})
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded["state"])
    return {jax.tree_util.keystr(name): np.asarray(x) for name, x in flat}, loaded["host"]


def _results(folder: Path) -> list[str]:
    """Returns the relative paths of a run's exported weights, summary and evaluation results, except missing files."""
    paths = [folder / EXPORT / WEIGHTS, folder / SUMMARY, *(folder / EVALUATIONS).glob("*.json")]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _without_seconds(usage: dict[str, Any]) -> dict[str, Any]:
    return {name: count for name, count in usage.items() if name != "seconds"}


def _untimed(line: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}


# Prefixes of metrics that depend on the mesh or consist only of rounding errors.
MESH_DEPENDENT = ("batch/pad", "batch/balance", "sampling/slot_utilization", "policy/logprob_gap")


def _bytes(folder: Path, name: str) -> bytes:
    path = folder / name
    return path.read_bytes() if path.is_file() else b""


def _same_records(ours: list[dict], theirs: list[dict], tolerance: float) -> bool:
    if tolerance == 0 or len(ours) != len(theirs):
        return ours == theirs
    is_same = lambda a, b: (
        np.isclose(a, b, rtol=tolerance, atol=tolerance) if isinstance(a, float) else a == b
    )
    return all(
        a.keys() == b.keys()
        and all(is_same(a[k], b[k]) for k in a if not k.startswith(MESH_DEPENDENT))
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_array(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> bool:
    if tolerance == 0:
        return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return np.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
