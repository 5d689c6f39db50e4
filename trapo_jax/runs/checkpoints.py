"""Checkpoints: device state and host state in one atomic commit, with a checksum of every file.

`<directory>/<step>/` appears by a rename once it is complete, its manifest included; what a killed save left
behind is ignored and cleaned up by the next one. Whoever restores one calls `verify` first, as Orbax hands out
flipped bits without a word. Several processes save and restore together, in a folder that all of them see.

Saves are synchronous: on the CPU backend a background save would read arrays that the next step, to which they
are donated, writes over.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from trapo_jax.distributed.processes import is_main, wait_for_all

STATE, HOST = "state", "host"
MANIFEST = "manifest.json"
DAMAGED = ".damaged"
WRITING, EXPIRED = ".writing", ".expired"


class DamagedCheckpoint(Exception):
    """A checkpoint's files differ from its manifest; names the step and the file."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
      newest: so many of the newest.
      every: those of steps divisible by this, too; 0 for none.
      best: so many with the highest scores, too.
    """

    newest: int = 2
    every: int = 0
    best: int = 0


class CheckpointStore:
    """The checkpoints of a run.

    Args:
      directory: created on the first save.
      retention: which stay.
    """

    def __init__(self, directory: Path, retention: Retention = Retention()):
        self._directory = directory.absolute()
        self._retention = retention
        # A dict of plain values would be saved as a pytree of arrays: the host's name takes JSON.
        self._registry = ocp.handlers.local_registry()
        self._registry.add(ocp.handlers.JsonHandler, checkpointable_name=HOST)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; each was complete when it got its name by a rename."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    def save(
        self, step: int, state: Any, host: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Commits both, then removes leftovers and what `Retention` does not keep.

        Args:
          step: the step after which this is the state.
          state: a pytree of arrays.
          host: what JSON can hold.
          score: of the state, for `Retention.best`.
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
            # Renamed first: a deletion cut short must not leave half a checkpoint under its number.
            self._path(expired).rename(self._path(expired).with_suffix(EXPIRED))
        for leftover in self._directory.iterdir():
            if not leftover.name.isdecimal() and DAMAGED not in leftover.name:
                shutil.rmtree(leftover)

    def verify(self, step: int) -> None:
        """Reads every byte of a checkpoint and compares with its manifest.

        Raises:
          DamagedCheckpoint: naming the step and the first file that differs.
        """
        folder = self._path(step)
        promised = _read_manifest(folder)["files"]
        there = _checksums(folder)
        for name in sorted({*promised, *there}):
            if name not in there:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is missing")
            if name not in promised:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} does not belong to it")
            if promised[name] != there[name]:
                raise DamagedCheckpoint(f"checkpoint {step}: {name} is damaged (SHA-256 differs)")

    def damaged(self) -> list[Path]:
        """Checkpoints that were put aside."""
        return sorted(self._directory.glob(f"*{DAMAGED}*"))

    def put_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is not taken for one; it is never deleted."""
        path = self._path(step)
        aside = path.with_suffix(DAMAGED)
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = path.with_suffix(f"{DAMAGED}{number}")
        return path.rename(aside)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state, placed as the shardings of `abstract_state` say, and the host's dict."""
        with self._context():
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: abstract_state, HOST: None}
            )
        return loaded[STATE], loaded[HOST]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, placed as the shardings of `abstract_params` say."""
        context = self._context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(
                str(self._path(step)), {STATE: {"params": abstract_params}}
            )
        return loaded[STATE]["params"]

    def best_score(self) -> float | None:
        """The highest score among the checkpoints; None if none has one."""
        return max(self._scores().values(), default=None)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _scores(self) -> dict[int, float]:
        """The scores of checkpoints that have one."""
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
        kept |= {step for step in steps if keep.every and step % keep.every == 0}
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
    """`score`, and `files`: SHA-256 by relative path.

    Raises:
      DamagedCheckpoint: if it is not exactly what `_write_manifest` wrote.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged") from error
    try:
        content = json.loads(text)
        promised = content.pop("sha256")
        whole = text == json.dumps({**content, "sha256": promised}, indent=1)
    except (ValueError, AttributeError, KeyError):
        whole, content, promised = False, {}, ""
    if not whole or promised != _checksum_of(content):
        raise DamagedCheckpoint(f"checkpoint {folder.name}: {MANIFEST} is damaged")
    return content


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by relative path."""
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
    """Forces a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
