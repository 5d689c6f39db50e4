"""Checkpoints: device state and host state, committed atomically together with a checksum of every file.

A checkpoint is written under a temporary name and renamed to `<directory>/<step>/` once it is complete, manifest
included. The files of an interrupted save are ignored and deleted by the next save. Call `verify` before restoring,
because Orbax does not detect corrupted data. In a multi-process job, all processes save and restore together in a
directory that they share.

Saves are synchronous. The next step overwrites the arrays, which are donated to it, and on the CPU backend an
asynchronous save would still be reading them.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from trapo_jax.distributed.processes import is_main, wait_for_all
from trapo_jax.types import UserError

STATE, HOST = "state", "host"
MANIFEST = "manifest.json"
DAMAGED = ".damaged"
WRITING, EXPIRED = ".writing", ".expired"


class DamagedCheckpoint(Exception):
    """The files of a checkpoint do not match its manifest. The message names the step and the file."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep. A checkpoint is kept if any of the rules applies.

    Attributes:
      newest: number of the most recent checkpoints to keep.
      best: number of the checkpoints with the highest scores to keep.
    """

    newest: int = 2
    best: int = 0


class CheckpointStore:
    """The checkpoints of a run.

    Args:
      directory: the directory of the checkpoints; created on the first save.
      retention: which checkpoints to keep.
    """

    def __init__(self, directory: Path, retention: Retention = Retention()):
        self._directory = directory.absolute()
        self._retention = retention
        # By default, Orbax would save the host state, a dict of plain values, as a pytree of arrays.
        self._registry = ocp.handlers.local_registry()
        self._registry.add(ocp.handlers.JsonHandler, checkpointable_name=HOST)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in ascending order."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    def save(
        self, step: int, state: Any, host: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Saves a checkpoint, then deletes expired checkpoints and the files of interrupted saves.

        Args:
          step: the last step that contributed to the state.
          state: a pytree of arrays.
          host: JSON-serializable host state.
          score: score of the state, for `Retention.best`.
        """
        path = self._path(step)
        partial = path.with_suffix(WRITING)
        with self._context():
            ocp.save_checkpointables(str(partial), {STATE: state, HOST: host}, overwrite=True)
        wait_for_all(f"checkpoint {step} written")
        if is_main():
            self._commit(path, partial, score)
        wait_for_all(f"checkpoint {step} committed")

    def _commit(self, path: Path, partial: Path, score: float | None) -> None:
        _write_manifest(partial, score)
        if path.exists():
            path.rename(path.with_suffix(EXPIRED))
        partial.rename(path)
        _sync_folder(self._directory)
        for expired in set(self.steps()) - self._kept():
            # Rename first, so that an interrupted deletion does not leave an incomplete checkpoint.
            self._path(expired).rename(self._path(expired).with_suffix(EXPIRED))
        for leftover in self._directory.iterdir():
            if not leftover.name.isdecimal() and DAMAGED not in leftover.name:
                shutil.rmtree(leftover)

    def verify(self, step: int) -> None:
        """Reads every file of a checkpoint and compares its checksum with the manifest.

        Raises:
          DamagedCheckpoint: if a file is missing, unexpected or damaged.
        """
        folder = self._path(step)
        expected = _read_manifest(folder)["files"]
        actual = _checksums(folder)
        for name in sorted({*expected, *actual}):
            if name not in actual:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is missing")
            if name not in expected:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is not in its manifest")
            if expected[name] != actual[name]:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is damaged (SHA-256 differs)")

    def newest_intact(self) -> int | None:
        """Returns the step of the newest intact checkpoint, None if there are none; damaged ones are renamed.

        Raises:
          UserError: if all checkpoints are damaged.
        """
        for step in reversed(self.steps()):
            try:
                self.verify(step)
                return step
            except DamagedCheckpoint as error:
                renamed = self.mark_damaged(step)
                print(f"warning: {error}; it was renamed to {renamed}", file=sys.stderr)
        if damaged := self.damaged():
            names = ", ".join(path.name for path in damaged)
            raise UserError(
                f"output_dir={self._directory.parent}: all checkpoints are damaged ({names}); choose a different output_dir"
            )
        return None

    def damaged(self) -> list[Path]:
        """Returns the paths of the checkpoints that were marked as damaged."""
        return sorted(self._directory.glob(f"*{DAMAGED}*"))

    def mark_damaged(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is ignored but never deleted, and returns its new path."""
        path = self._path(step)
        marked = path.with_suffix(DAMAGED)
        for number in range(2, 1000):
            if not marked.exists():
                break
            marked = path.with_suffix(f"{DAMAGED}{number}")
        return path.rename(marked)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state, sharded like `abstract_state`, and the host state."""
        with self._context():
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: abstract_state, HOST: None}
            )
        return loaded[STATE], loaded[HOST]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns only the parameters, sharded like `abstract_params`."""
        context = self._context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: {"params": abstract_params}}
            )
        return loaded[STATE]["params"]

    def best_score(self) -> float | None:
        """Returns the highest score of a checkpoint; None if no checkpoint has a score."""
        return max(self._scores().values(), default=None)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _scores(self) -> dict[int, float]:
        """Returns scores by step; checkpoints without a score or with a damaged manifest are omitted."""
        scores = {}
        for step in self.steps():
            try:
                score = _read_manifest(self._path(step))["score"]
            except DamagedCheckpoint:
                continue
            if score is not None:
                scores[step] = score
        return scores

    def _kept(self) -> set[int]:
        steps, keep = self.steps(), self._retention
        kept = set(steps[-keep.newest :])
        if keep.best:
            scores = self._scores()
            kept |= set(sorted(scores, key=lambda step: (scores[step], step))[-keep.best :])
        return kept

    def _context(self) -> ocp.Context:
        context = ocp.Context()
        context.checkpointables.registry = self._registry
        return context


def _write_manifest(folder: Path, score: float | None) -> None:
    content = {"score": score, "files": _checksums(folder)}
    text = json.dumps({**content, "sha256": _checksum_of(content)}, indent=1)
    with open(folder / MANIFEST, "x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a dict with `score`, and `files`, which maps relative paths to SHA-256 checksums.

    Raises:
      DamagedCheckpoint: if the manifest is not exactly what `_write_manifest` wrote.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged") from error
    try:
        content = json.loads(text)
        expected = content.pop("sha256")
        is_intact = text == json.dumps({**content, "sha256": expected}, indent=1)
    except (ValueError, AttributeError, KeyError):
        is_intact, content, expected = False, {}, ""
    if not is_intact or expected != _checksum_of(content):
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged")
    return content


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 checksum of every file except the manifest, by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor() as pool:
        return dict(
            zip(
                (path.relative_to(folder).as_posix() for path in paths),
                pool.map(_file_checksum, paths),
                strict=True,
            )
        )


def _file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flushes the entries of a directory to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
