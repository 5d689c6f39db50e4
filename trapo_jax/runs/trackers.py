"""Sends the metrics of a run to experiment trackers: TensorBoard, Weights & Biases, Trackio, or a tracker of your own.

metrics.jsonl remains the source of truth. A tracker that fails causes a warning and is not used again.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trapo_jax.inputs.import_path import import_object, suggest
from trapo_jax.inputs.printable import printable
from trapo_jax.runs.directory import TENSORBOARD
from trapo_jax.runs.tensorboard import TensorBoard
from trapo_jax.types import UserError

PROJECT = "trapo_jax"
FIELD = "trackers"
# Fields of the records in samples.jsonl that are sent to trackers.
SAMPLE_COLUMNS = (
    "step",
    "problem_id",
    "sample_index",
    "prompt",
    "prefix",
    "completion",
    "gold",
    "reward",
    "advantage",
)


class TrackedRun(NamedTuple):
    """What a tracker is told about a run.

    Attributes:
      folder: the run directory.
      run_id: id of the run; the same if the run is resumed.
      config: the resolved config.
    """

    folder: Path
    run_id: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Receives the metrics and samples of a run.

    After a run is resumed, the steps after its last checkpoint are repeated and sent again, with the same values.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Receives the metrics of a step or of an evaluation after it."""
        ...

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Receives the last rollouts written to samples.jsonl, after every evaluation."""
        ...

    def flush(self) -> None:
        """Is called before every checkpoint."""
        ...

    def close(self) -> None:
        """Is called once, when the run ends or stops."""
        ...


class Wandb:
    """Sends metrics to Weights & Biases. `WANDB_MODE=offline` writes them to the run directory; see `wandb sync`."""

    def __init__(self, run: TrackedRun):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=PROJECT,
            id=run.run_id,
            name=run.folder.name,
            dir=str(run.folder),
            config=dict(run.config),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        rows: Any = [[record[name] for name in SAMPLE_COLUMNS] for record in records]
        self._run.log({"samples": self._table(columns=list(SAMPLE_COLUMNS), data=rows)}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Writes metrics to Trackio's local database; `TRACKIO_DIR` sets its folder, and `trackio show` displays it."""

    def __init__(self, run: TrackedRun):
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=f"{run.folder.name}-{run.run_id}",
                config=dict(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        import pandas

        table = pandas.DataFrame([{n: record[n] for n in SAMPLE_COLUMNS} for record in records])
        self._run.log({"samples": self._trackio.Table(dataframe=table)}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # Unlike `self._run.finish`, this is not repeated at exit.


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": lambda run: TensorBoard(run.folder / TENSORBOARD, run.run_id),
    "wandb": Wandb,
    "trackio": Trackio,
}


class Trackers:
    """All trackers of a run.

    Args:
      names: keys of `TRACKERS`, or import paths `package.module:name` of classes that implement `Tracker`.
      run: the run.

    Raises:
      UserError: if a name is unknown, or its package is not installed.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun):
        self._trackers = {}
        # Look up all names first, so that no tracker is started if one of the names is wrong.
        for name, make in [(name, find_tracker(name)) for name in names]:
            try:
                self._trackers[name] = make(run)
            except Exception as error:
                if isinstance(error, ImportError) and name in TRACKERS:
                    raise UserError(
                        f"{FIELD}={name}: {error.name or name} is not installed; pip install 'trapo-jax[{name}]'"
                    ) from error
                self._disable(name, error)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Sends all values that are numbers."""
        numbers = {printable(n): v for n, v in values.items() if not isinstance(v, str)}
        self._call(lambda tracker: tracker.scalars(numbers, step))

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        if records:
            self._call(lambda tracker: tracker.samples(records, step))

    def flush(self) -> None:
        self._call(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._call(lambda tracker: tracker.close())
        self._trackers = {}

    def _call(self, function: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                function(tracker)
            except Exception as error:
                self._disable(name, error)

    def _disable(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        reason = printable(str(error).strip().partition("\n")[0])[:200]
        print(
            f"warning: {FIELD}={name}: no more metrics are sent ({type(error).__name__}: {reason}); metrics.jsonl "
            "contains all of them",
            file=sys.stderr,
        )


def find_tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """Returns the class or function that builds a tracker.

    Raises:
      UserError: if the name is unknown, or the import path is wrong.
    """
    if name in TRACKERS:
        return TRACKERS[name]
    if ":" not in name:
        raise UserError(f"{FIELD}={name}: no such tracker; {suggest(name, TRACKERS)}")
    return import_object(name, FIELD)
