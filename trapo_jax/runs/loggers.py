"""Writes and reads the logs of a run: metrics.jsonl (the source of truth), samples.jsonl, and experiment trackers."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from trapo_jax.config import Config
from trapo_jax.distributed.processes import is_main
from trapo_jax.inputs.files import read_json_object, read_lines
from trapo_jax.runs.directory import (
    METRICS,
    SAMPLES,
    SUMMARY,
    TENSORBOARD,
    evaluation_file,
    write_atomically,
)
from trapo_jax.runs.progress import counted
from trapo_jax.runs.tensorboard import event_files
from trapo_jax.runs.trackers import TrackedRun, Trackers
from trapo_jax.types import UserError

TRAIN, EVAL = "train", "eval"
NUM_SAMPLES, TEMPERATURE = "eval/num_samples", "eval/temperature"
NEEDED_SCORES = ("eval/num_problems", NUM_SAMPLES, TEMPERATURE)
MAX_RECORD_BYTES = 2**25  # Larger than the record of the longest rollout that a config allows.


class RunLog:
    """Appends to the log files of a run directory.

    Args:
      folder: the run directory.
      offsets: the result of `offsets()` saved in the checkpoint; None for a new run. Everything written after the
        checkpoint is deleted, including TensorBoard events, so that no step is logged twice.
      run_id: id of the run.
      trackers: names of the trackers that also receive the metrics; see `Trackers`.
      config: the resolved config, for the trackers.

    Raises:
      UserError: if a file is shorter than it was at the checkpoint, metrics.jsonl is damaged, or a tracker does not
        exist.
    """

    FILES = (METRICS, SAMPLES)

    def __init__(
        self,
        folder: Path,
        *,
        offsets: Mapping[str, int] | None,
        run_id: str,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._folder, self._run_id = folder, run_id
        offsets = offsets or dict.fromkeys(self.FILES, 0)
        _truncate(folder, offsets, self.FILES, event_files(folder / TENSORBOARD, run_id))
        if (folder / METRICS).exists():
            read_metrics(folder)  # Raises now rather than at the end of the run.
        self._files = {
            name: open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            for name in self.FILES
        }
        self._trackers = Trackers(trackers, TrackedRun(folder, run_id, config))
        self._last_samples: Sequence[Mapping[str, Any]] = ()

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes a record with `step`, `kind` and the values to metrics.jsonl; NaN and infinity become null.

        Numbers are also sent to the trackers. If the values include a split, the names are prefixed with it.
        """
        self._write(METRICS, {"step": step, "kind": kind, **values})
        prefix = f"{values['split']}/" if "split" in values else ""
        self._trackers.scalars({prefix + name: value for name, value in values.items()}, step)

    def evaluation(
        self, split: str, step: int, values: Mapping[str, Any], problems: Mapping[str, list]
    ) -> None:
        """Writes per-problem results to a file in evaluations/, then a record to metrics.jsonl."""
        path = evaluation_file(self._folder, split, step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(problems) + "\n")
        self.metrics(EVAL, step, {"split": split, **values})
        self._trackers.samples(self._last_samples, step)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records to samples.jsonl."""
        for record in records:
            self._write(SAMPLES, record)
        self._last_samples = records

    def offsets(self) -> dict[str, int]:
        """Flushes the files to disk and returns their sizes in bytes, keyed by path relative to the run directory."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._trackers.flush()
        events = event_files(self._folder / TENSORBOARD, self._run_id)
        paths = [*(self._folder / name for name in self._files), *events]
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._trackers.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        text = json.dumps(_finite(record), ensure_ascii=True, allow_nan=False)
        self._files[name].write(text + "\n")
        self._files[name].flush()


class NoLog(RunLog):
    """A `RunLog` that discards everything. Used by all processes except the main one."""

    def __init__(self):
        pass

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def evaluation(
        self, split: str, step: int, values: Mapping[str, Any], problems: Mapping[str, list]
    ) -> None:
        pass

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        pass

    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def open_log(config: Config, *, offsets: Mapping[str, int] | None, run_id: str) -> RunLog:
    """Opens the log of a run; in all processes except the main one, a log that discards everything."""
    if not is_main():
        return NoLog()
    return RunLog(
        config.run_folder,
        offsets=offsets,
        run_id=run_id,
        trackers=config.trackers,
        config=config.model_dump(mode="json"),
    )


def _truncate(
    folder: Path, offsets: Mapping[str, int], needed: Sequence[str], events: Sequence[Path]
) -> None:
    """Truncates the log files to `offsets`, and deletes event files without an offset, which were created later."""
    paths = {path.relative_to(folder).as_posix(): path for path in events}
    paths |= {name: folder / name for name in needed}
    for name, path in paths.items():
        length = path.stat().st_size if path.exists() else 0
        if name not in offsets:
            path.unlink()
        elif length > offsets[name]:
            os.truncate(path, offsets[name])
        elif length < offsets[name] and name in needed:
            raise UserError(
                f"{path}: has {length} bytes, but had {offsets[name]} at the checkpoint; restore the file or choose a "
                "different output_dir"
            )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl in a run directory."""
    return list(read_records(folder / METRICS))


def write_summary(folder: Path, splits: Sequence[str], *, model_step: int) -> dict[str, Any]:
    """Writes the summary of a run, which marks the run as complete.

    Args:
      folder: the run directory.
      splits: the splits evaluated before and after training.
      model_step: step of the final model's parameters; not the last step if the best checkpoint was loaded.

    Returns:
      The scores before and after training, keyed by split.
    """
    evaluations = [record for record in read_metrics(folder) if record["kind"] == EVAL]
    first = {record["split"]: record for record in reversed(evaluations)}
    last = {record["split"]: record for record in evaluations}
    last |= {record["split"]: record for record in evaluations if record["step"] == model_step}
    summary = {
        split: {"before": _scores(first[split]), "after": _scores(last[split])}
        for split in splits
        if split in first  # A split without answers is not evaluated.
    }
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns the summary of a complete run; see `write_summary`.

    Raises:
      UserError: if the summary is damaged.
    """
    path = folder / SUMMARY
    way_out = "delete the file and run the same command to write it again"
    try:
        summary = read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from error
    for scores in summary.values():
        before, after = (
            scores.get(when) if isinstance(scores, dict) else None for when in ("before", "after")
        )
        if not (_are_scores(before) and _are_scores(after) and after.keys() <= before.keys()):
            raise UserError(f"{path}: damaged; {way_out}")
    return summary


def _are_scores(scores: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(scores, dict)
        and all(name in scores for name in NEEDED_SCORES)
        and all(
            isinstance(value, int | float)
            or (value is None and not is_shown(name) and name not in NEEDED_SCORES)
            for name, value in scores.items()
        )
    )


def is_shown(name: str) -> bool:
    """Returns whether tables show the score with this name. Scores that are shown are never null; others may be."""
    return "accuracy" in name or "pass@" in name


def describe_samples(scores: Mapping[str, float]) -> str:
    """Describes how many samples per problem were scored, and their temperature.

    Args:
      scores: `eval/...` metrics, keyed by name.

    >>> describe_samples({"eval/num_samples": 8, "eval/temperature": 0.6})
    '8 samples each at temperature 0.6'
    >>> counts = {"eval/num_samples/aime24": 32, "eval/num_samples/math500": 4}
    >>> describe_samples({"eval/num_samples": 4, "eval/temperature": 1.0, **counts})
    '32 (aime24) or 4 (math500) samples each at temperature 1'
    """
    prefix = f"{NUM_SAMPLES}/"
    counts = [
        f"{number} ({name.removeprefix(prefix)})"
        for name, number in scores.items()
        if name.startswith(prefix)
    ]
    number = (
        f"{' or '.join(counts)} samples each"
        if counts
        else f"{counted(scores[NUM_SAMPLES], 'sample')} each"
    )
    return f"{number} at temperature {scores[TEMPERATURE]:g}"


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("eval/")}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSON Lines file, except for an incomplete last line.

    Raises:
      UserError: if a line is not a JSON object.
    """
    for number, line in read_lines(path, max_bytes=MAX_RECORD_BYTES):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: not a JSON object; restore the file, or start a new run"
            )
        yield record


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity with None because JSON cannot represent them."""
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
