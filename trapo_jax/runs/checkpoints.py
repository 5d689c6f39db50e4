"""Saves and restores checkpoints: device and host state, committed atomically with a checksum of every file.

A checkpoint is written under a temporary name and renamed to `<directory>/<step>/` once it is complete and on disk,
including its manifest. The manifest identifies the step, the run and its config, so that renamed checkpoints and
checkpoints copied from another run are detected. Call `verify` before restoring, because Orbax does not detect
corrupted data. In a multi-process job, all processes save and restore together in a shared directory.

`CheckpointStore._kept` decides which checkpoints are kept, according to a `Retention` that `Run` creates from
`CheckpointConfig` (in `config/schema.py`). `Run.save_if_due` decides when a checkpoint is saved.

This module deletes only what it wrote: the files listed in an expired checkpoint's manifest, and the directory of an
interrupted save, whose name is recorded in a journal. Other files in the directory are left alone.

Saves are synchronous because the next step overwrites the arrays, which are donated to it. On the CPU backend, an
asynchronous save would still be reading the arrays at that time.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from orbax.checkpoint import v1 as ocp

from trapo_jax.distributed.processes import is_main, wait_for_all
from trapo_jax.runs.manifests import (
    MANIFEST,
    DamagedCheckpoint,
    checksums,
    read_manifest,
    sync,
    write_manifest,
    write_synced,
)
from trapo_jax.types import UserError

STATE, HOST = "state", "host"
DAMAGED = ".damaged"
WRITING, EXPIRED = ".writing", ".expired"
ASIDE = ".aside"  # Suffix for a foreign directory that occupied a checkpoint's path.
JOURNAL = ".saving"  # File that contains the directory name of the save in progress.
_STEP = re.compile(r"(?:0|[1-9][0-9]*)")
_OURS = re.compile(rf"{_STEP.pattern}(\{EXPIRED}|\{DAMAGED}[0-9]*|\{WRITING}.*)?|\{JOURNAL}")


class Trainable(Protocol):
    """The part of a learner that a run saves and restores."""

    state: Any

    def abstract_state(self) -> Any: ...

    def free(self) -> None: ...


class ForeignCheckpoint(Exception):
    """Raised if a checkpoint belongs to a different step or run than its path suggests. The message states which."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Specifies which checkpoints to keep. A checkpoint is kept if either rule applies.

    Attributes:
      newest: number of most recent checkpoints to keep.
      best: number of highest-scoring checkpoints to keep.
    """

    newest: int = 2
    best: int = 0


class CheckpointStore:
    """The checkpoints of a run.

    Args:
      directory: the checkpoint directory; created on the first save.
      retention: which checkpoints to keep.
      identity: values that identify the run in manifests, keyed by name; None to accept checkpoints of any run.
    """

    def __init__(
        self,
        directory: Path,
        retention: Retention = Retention(),
        *,
        identity: Mapping[str, str] | None = None,
    ):
        self._directory = directory.absolute()
        self._retention = retention
        self._identity = dict(identity or {})
        # By default, Orbax would save the host state, a dict of plain values, as a pytree of arrays.
        self._registry = ocp.handlers.local_registry()
        self._registry.add(ocp.handlers.JsonHandler, checkpointable_name=HOST)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in ascending order."""
        if not self._directory.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self._directory.iterdir()
            if _STEP.fullmatch(path.name) and path.is_dir()
        )

    def unknown(self) -> list[str]:
        """Returns the names of directory entries that do not follow this module's naming scheme."""
        if not self._directory.is_dir():
            return []
        return sorted(p.name for p in self._directory.iterdir() if not _OURS.fullmatch(p.name))

    def save(
        self, step: int, state: Any, host: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Deletes the remains of an interrupted save, saves a checkpoint, and deletes expired checkpoints.

        Args:
          step: number of completed steps.
          state: a pytree of arrays.
          host: JSON-serializable host state.
          score: score of the state, for `Retention.best`.
        """
        path = self._path(step)
        partial = path.with_suffix(WRITING)
        if is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            self.clean()
            write_synced(self._directory / JOURNAL, partial.name)
        wait_for_all(f"checkpoint {step} begun")
        with self._context():
            ocp.save_checkpointables(str(partial), {STATE: state, HOST: host}, overwrite=True)
        wait_for_all(f"checkpoint {step} written")
        if is_main():
            self._commit(path, partial, score)
        wait_for_all(f"checkpoint {step} committed")

    def _commit(self, path: Path, partial: Path, score: float | None) -> None:
        content = {"step": int(path.name), "run": self._identity, "score": score}
        write_manifest(partial, content)
        if path.exists():
            path.rename(path.with_suffix(EXPIRED) if self._is_ours(path) else _unused(path, ASIDE))
        partial.rename(path)
        sync(self._directory)
        (self._directory / JOURNAL).unlink()
        self.clean()

    def clean(self) -> None:
        """Deletes expired checkpoints and the directory of an interrupted save. Only process 0 may call this."""
        journal = self._directory / JOURNAL
        if journal.is_file():
            name = journal.read_text(encoding="utf-8")
            if re.fullmatch(rf"{_STEP.pattern}\{WRITING}", name):
                # Orbax appends a suffix to the name.
                for partial in self._directory.glob(f"{name}*"):
                    shutil.rmtree(partial)
            journal.unlink()
        for expired in set(self._own_steps()) - self._kept():
            # Rename the checkpoint first, so that an interrupted deletion does not leave an incomplete checkpoint.
            self._path(expired).rename(self._path(expired).with_suffix(EXPIRED))
        for expired in self._directory.glob(f"*{EXPIRED}"):
            if _STEP.fullmatch(expired.stem) and self._is_ours(expired):
                _delete_listed(expired)

    def _is_ours(self, folder: Path) -> bool:
        """Returns whether a directory is a checkpoint of this run and has its original name."""
        try:
            self._check_identity(folder, read_manifest(folder))
        except (DamagedCheckpoint, ForeignCheckpoint):
            return False
        return True

    def _own_steps(self) -> list[int]:
        return [step for step in self.steps() if self._is_ours(self._path(step))]

    def _check_identity(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        if manifest["step"] != int(folder.stem):
            raise ForeignCheckpoint(
                f"checkpoint {folder.name}: it was saved after step {manifest['step']}; restore its original name"
            )
        for name, value in self._identity.items():
            if manifest["run"].get(name) != value:
                raise ForeignCheckpoint(
                    f"checkpoint {folder.name}: it was saved by a different run or with a different config ({name} "
                    "differs)"
                )

    def verify(self, step: int) -> None:
        """Reads every file of a checkpoint and compares its checksum with the manifest.

        Raises:
          DamagedCheckpoint: if a file is missing, unexpected or damaged.
          ForeignCheckpoint: if the checkpoint belongs to a different step or run.
        """
        folder = self._path(step)
        manifest = read_manifest(folder)
        self._check_identity(folder, manifest)
        expected = manifest["files"]
        actual = checksums(folder)
        for name in sorted({*expected, *actual}):
            if name not in actual:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is missing")
            if name not in expected:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is not listed in its manifest")
            if expected[name] != actual[name]:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is damaged (SHA-256 differs)")

    def newest_intact(self) -> int | None:
        """Returns the step of the newest intact checkpoint, or None if there are no checkpoints.

        Damaged checkpoints that are newer are renamed.

        Raises:
          UserError: if there are checkpoints, but none of them is an intact checkpoint of this run.
        """
        for step in reversed(self.steps()):
            try:
                self.verify(step)
                return step
            except ForeignCheckpoint as error:
                print(f"warning: {error}; it is ignored", file=sys.stderr)
            except DamagedCheckpoint as error:
                renamed = self.mark_damaged(step)
                print(f"warning: {error}; it was renamed to {renamed}", file=sys.stderr)
        if self.steps():
            raise UserError(
                f"output_dir={self._directory.parent}: none of the checkpoints were saved by this run; restore the "
                "original checkpoints or choose a different output_dir"
            )
        if damaged := self.damaged():
            names = ", ".join(path.name for path in damaged)
            raise UserError(
                f"output_dir={self._directory.parent}: all checkpoints are damaged ({names}); choose a different "
                "output_dir"
            )
        return None

    def damaged(self) -> list[Path]:
        """Returns the paths of the checkpoints marked as damaged."""
        return sorted(self._directory.glob(f"*{DAMAGED}*"))

    def mark_damaged(self, step: int) -> Path:
        """Renames a damaged checkpoint so that it is ignored but never deleted, and returns its new path."""
        path = self._path(step)
        return path.rename(_unused(path, DAMAGED))

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a checkpoint, sharded like `abstract_state`, and its host state."""
        with self._context():
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: abstract_state, HOST: None}
            )
        return loaded[STATE], loaded[HOST]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns only the parameters of a checkpoint, sharded like `abstract_params`."""
        with self._context(partial_load=True):
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: {"params": abstract_params}}
            )
        return loaded[STATE]["params"]

    def best_score(self) -> float | None:
        """Returns the highest checkpoint score; None if no checkpoint has a score."""
        return max(self._scores().values(), default=None)

    def best_intact(self, above: float) -> int | None:
        """Returns the step of the best intact checkpoint that scores higher than `above`; None if there is none."""
        scores = {step: score for step, score in self._scores().items() if score > above}
        for step in sorted(scores, key=lambda step: (scores[step], step), reverse=True):
            try:
                self.verify(step)
                return step
            except (DamagedCheckpoint, ForeignCheckpoint) as error:
                print(f"warning: {error}; it cannot be loaded", file=sys.stderr)
        return None

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _scores(self) -> dict[int, float]:
        """Returns scores keyed by step, omitting checkpoints without a score or with a damaged manifest."""
        scores = {}
        for step in self._own_steps():
            score = read_manifest(self._path(step))["score"]
            if score is not None:
                scores[step] = score
        return scores

    def _kept(self) -> set[int]:
        steps, keep = self._own_steps(), self._retention
        kept = set(steps[-keep.newest :])
        if keep.best:
            scores = self._scores()
            kept |= set(sorted(scores, key=lambda step: (scores[step], step))[-keep.best :])
        return kept

    @contextlib.contextmanager
    def _context(self, *, partial_load: bool = False) -> Iterator[None]:
        """Configures Orbax, and keeps it from logging errors (with thread tracebacks) that it also raises."""
        context = ocp.Context()
        context.checkpointables.registry = self._registry
        context.pytree.loading.partial_load = partial_load
        loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        were_disabled = [logger.disabled for logger in loggers]
        try:
            for logger in loggers:
                logger.disabled = True
            with context, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
                yield
        finally:
            for logger, was_disabled in zip(loggers, were_disabled, strict=True):
                logger.disabled = was_disabled


def _unused(path: Path, suffix: str) -> Path:
    """Returns `path` with a suffix, and with a number appended if that path is already in use."""
    candidate = path.with_suffix(suffix)
    number = 2
    while candidate.exists():
        candidate = path.with_suffix(f"{suffix}{number}")
        number += 1
    return candidate


def _delete_listed(folder: Path) -> None:
    """Deletes the files listed in a checkpoint's manifest, then the manifest and all directories that are now empty."""
    listed = read_manifest(folder)["files"]
    # In reverse order, files come before the directory that contains them.
    inside = sorted(folder.rglob("*"), reverse=True)
    for path in inside:
        if path.is_dir():
            _remove_if_empty(path)
        elif path.relative_to(folder).as_posix() in listed:
            path.unlink()
    (folder / MANIFEST).unlink()
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
