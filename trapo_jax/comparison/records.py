"""Reads and writes the records of completed runs, from which the tables of a comparison are made.

A record takes a few kB and contains the run's config, code version, machine and `Result`. Records from several machines
can be collected in one folder. Once a record exists, the run directory is no longer needed.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trapo_jax.comparison.grid import METHOD_NAME, PlannedRun
from trapo_jax.comparison.results import (
    CurvePoint,
    Result,
    Scores,
    is_complete,
    make_scores,
    read_result,
)
from trapo_jax.config import Config, flatten, is_changeable, load_config
from trapo_jax.inputs.files import read_json_object
from trapo_jax.runs.directory import NUM_STEPS, write_atomically
from trapo_jax.runs.started_with import code_version
from trapo_jax.types import UserError

OUTPUT_DIR, SOURCE = "output_dir", "data.source"
SEPARATORS = (",", ":")
SHOWN = 3  # Maximum number of differing fields that an error message lists.


def is_done(run: PlannedRun) -> bool:
    """Returns whether the run has a record, or is complete so that a record can be written.

    Raises:
      UserError: if the record belongs to a run with a different config.
    """
    return load_record(run) is not None or is_complete(run)


def collect_result(run: PlannedRun) -> Result:
    """Returns the result of a run that is done, and writes its record if it has none."""
    if load_record(run) is None:
        write_record(run, read_result(run))
    return load_result(run)


def load_result(run: PlannedRun) -> Result:
    """Returns the result stored in the record of a run.

    Raises:
      UserError: if there is no such record, or it cannot be read.
    """
    record = load_record(run)
    if record is None:
        raise UserError(f"{run.record}: no record of a completed run")
    try:
        made_by = {"code": record["code"], "processor": record["machine"]["processor"]}
        return _to_result(run, record["result"] | made_by)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, repr(error)) from error


def load_record(run: PlannedRun) -> dict[str, Any] | None:
    """Returns the record of a run, or None if there is none or the recorded run had fewer steps than are now requested.

    Raises:
      UserError: if the record belongs to a run with a different config.
    """
    if not run.record.exists():
        return None
    record = read_json_object(run.record)
    saved, current = record.get("config"), _fields(run.config)
    if not isinstance(saved, dict):
        raise _damaged(run, "no config")
    # Fields that the record lacks were added later. Until then, the code behaved as it does now with their defaults.
    task = [(name, current[name]) for name in (SOURCE, METHOD_NAME)]
    saved = _fields(load_config(Config, None, task)) | saved
    fields = [f for f in {*saved, *current} if saved.get(f) != current.get(f)]
    if different := sorted(f for f in fields if not is_changeable(f)):
        if different == [NUM_STEPS] and saved[NUM_STEPS] < current[NUM_STEPS]:
            return None  # The run will be continued.
        listed = ", ".join(
            f"{f}={saved.get(f)}, not {current.get(f)}" for f in different[:SHOWN]
        ) + (", ..." if len(different) > SHOWN else "")
        raise UserError(
            f"{run.record}: record of a run with {listed}; choose a different folder with --records"
        )
    return record


def _damaged(run: PlannedRun, why: str) -> UserError:
    return UserError(f"{run.record}: damaged ({why}); restore it, or delete it to repeat the run")


def write_record(run: PlannedRun, result: Result) -> None:
    """Writes the record of a run that this version of the code completed on this machine."""
    record = {
        "method": run.trial.method,
        "setting": run.trial.setting,
        "seed": run.seed,
        "code": code(),
        "jax": version("jax"),
        "machine": machine(),
        "config": _fields(run.config),
        "result": _to_json(result),
    }
    run.record.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, separators=SEPARATORS)}"
        for name, value in record.items()
    ]
    write_atomically(run.record, "{\n" + ",\n".join(lines) + "\n}\n")


def _fields(config: Config) -> dict[str, Any]:
    """Returns the JSON values of a config's fields, keyed by name, without `output_dir`."""
    fields = flatten(config.model_dump(mode="json"))
    return {name: value for name, value in fields.items() if name != OUTPUT_DIR}


@functools.cache
def code() -> str:
    """Returns the commit if the code is in a clean Git checkout; otherwise, the version with a hash of the files."""
    folder = str(Path(__file__).parent)
    try:
        git = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        process = subprocess.run(git, capture_output=True, text=True)
    except OSError:  # Git is not installed.
        return code_version()
    commit = process.stdout.strip()
    is_exact = process.returncode == 0 and not commit.endswith("-dirty")
    return f"commit {commit}" if is_exact else code_version()


@functools.cache
def machine() -> dict[str, Any]:
    """Returns this machine's processor and the instruction sets that determine the speed of matrix products."""
    name, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = [line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    special = [x for x in ("avx512f", "avx512_bf16", "amx_bf16") if x in flags.split()]
    return {"processor": name, "instructions": special, "cores": os.cpu_count()}


def _to_json(result: Result) -> dict[str, Any]:
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(Result)}
    values["curve"] = [point._asdict() for point in result.curve]
    for name in ("before", "after"):
        scores = getattr(result, name)
        values[name] = scores and {
            "problems": scores.problems,
            "sources": _pack(scores.sources),
            "greedy": scores.greedy.astype(int).tolist(),
            "correct": np.rint(scores.sampled * scores.numbers).astype(int).tolist(),
            "completion_len": scores.completion_len,
        }
    for name in ("run", "code", "processor"):  # These are not measurements.
        del values[name]
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _to_result(run: PlannedRun, values: Mapping[str, Any]) -> Result:
    parts = {name: values[name] and _to_scores(run, values[name]) for name in ("before", "after")}
    curve = tuple(CurvePoint(**point) for point in values["curve"])
    numbers = {name: math.nan if value is None else value for name, value in values.items()}
    return Result(**{**numbers, "run": run, "curve": curve, **parts})


def _to_scores(run: PlannedRun, values: Mapping[str, Any]) -> Scores:
    scoring, correct = run.config.evaluation, values["correct"]
    # Records of an older version have no sources; all their problems have the same number of samples.
    sources = _unpack(values["sources"]) if "sources" in values else []
    return make_scores(
        problems=values["problems"],
        sources=sources,
        numbers=[scoring.num_samples_of(x) for x in sources]
        or [scoring.num_samples] * len(correct),
        greedy=values["greedy"],
        correct=correct,
        completion_len=values["completion_len"],
    )


def _pack(texts: Sequence[str]) -> dict[str, Any]:
    """Returns a compact form of strings with many duplicates: the distinct strings, and the index of each string."""
    values = sorted(set(texts))
    return {"values": values, "index": [values.index(text) for text in texts]}


def _unpack(packed: Mapping[str, Any]) -> list[str]:
    """Returns the list of strings that was passed to `_pack`."""
    return [packed["values"][i] for i in packed["index"]]
