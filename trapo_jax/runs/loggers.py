"""The logs of a run: metrics.jsonl (the source of truth), TensorBoard and samples.jsonl."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo_jax.runs.console import printable
from trapo_jax.runs.directory import METRICS, SAMPLES
from trapo_jax.types import UserError

TRAIN, EVAL = "train", "eval"
TENSORBOARD = "tb"


class RunLog:
    """Appends to the files of a run folder.

    Args:
      folder: the run folder.
      offsets: what `offsets()` returned at the checkpoint that is resumed from, None at the start;
        everything written since is cut off, TensorBoard's files included, so that no step appears twice.

    Raises:
      UserError: if a file is shorter than it was at the checkpoint.
    """

    FILES = (METRICS, SAMPLES)

    def __init__(self, folder: Path, *, offsets: Mapping[str, int] | None):
        from tensorboardX import SummaryWriter  # seconds to import

        self._folder = folder
        offsets = offsets or dict.fromkeys(self.FILES, 0)
        _cut(folder, offsets, self.FILES)
        self._files = {
            name: open(folder / name, "a", encoding="utf-8")  # noqa: SIM115
            for name in self.FILES
        }
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD))

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: `step`, `kind`, and the values (NaN and inf as null)."""
        self._write(METRICS, {"step": step, "kind": kind, **values})
        prefix = f"{values['split']}/" if "split" in values else ""
        for name, value in values.items():
            if not isinstance(value, str):
                self._tensorboard.add_scalar(printable(prefix + name), value, step)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        for record in records:
            self._write(SAMPLES, record)

    def offsets(self) -> dict[str, int]:
        """Lengths of the files in bytes, by path in the folder, after forcing them to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._tensorboard.flush()
        paths = [*(self._folder / name for name in self._files), *_event_files(self._folder)]
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in paths}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._tensorboard.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        text = json.dumps(_finite(record), ensure_ascii=True, allow_nan=False)
        self._files[name].write(text + "\n")
        self._files[name].flush()


class NoLog(RunLog):
    """Of the processes that write nothing."""

    def __init__(self):
        pass

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        pass

    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def _cut(folder: Path, offsets: Mapping[str, int], needed: Sequence[str]) -> None:
    """Cuts the files of a log at `offsets`, and removes the event files that were not there then."""
    paths = {path.relative_to(folder).as_posix(): path for path in _event_files(folder)}
    paths |= {name: folder / name for name in needed}
    for name, path in paths.items():
        length = path.stat().st_size if path.exists() else 0
        if name not in offsets:
            path.unlink()
        elif length > offsets[name]:
            os.truncate(path, offsets[name])
        elif length < offsets[name] and name in needed:
            raise UserError(
                f"{path}: {length} bytes, but it had {offsets[name]} at the checkpoint; put it back, or "
                "give another output_dir"
            )


def _event_files(folder: Path) -> list[Path]:
    return sorted((folder / TENSORBOARD).glob("events.*"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return list(read_records(folder / METRICS))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file, but for a last one that is still being written.

    Raises:
      UserError: naming the line that is none.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not a JSON record") from error


def _finite(value: Any) -> Any:
    """The same with null for NaN and inf, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
