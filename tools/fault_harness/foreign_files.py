"""Puts foreign files and folders into a run directory, and checks that they are left alone."""

import os
import random
import stat
from pathlib import Path

from fault_harness.jobs import Failure
from trapo_jax.runs.directory import CHECKPOINTS, EVALUATIONS, EXPORT, MODEL, TENSORBOARD

SUBFOLDERS = (CHECKPOINTS, EVALUATIONS, MODEL, EXPORT, TENSORBOARD)
FILES = (
    "notes.txt",
    ".hidden",
    "12",
    "007",
    "5.old",
    "results.json",
    "config.json.bak",
    "metrics.jsonl",
    "a b",
    "new\nline",
    "ünïcode",
    "-rf",
    "x" * 200,
)
FOLDERS = ("12_backup", "4.writing", "6.expired", "8.damaged", "copy of 9")


def plant(run: Path, rng: random.Random) -> dict[Path, object]:
    """Puts 20 kinds of files and folders into each subfolder of a run; returns their contents, keyed by path."""
    planted = []
    for name in SUBFOLDERS:
        folder = run / name
        folder.mkdir(exist_ok=True)
        for file in FILES:
            _write(folder / file, rng)
            planted.append(folder / file)
        for inner in FOLDERS:
            (folder / inner).mkdir()
            _write(folder / inner / "kept", rng)
            planted += [folder / inner, folder / inner / "kept"]
        os.mkfifo(folder / "pipe")
        (folder / "dangling").symlink_to("nowhere")
        planted += [folder / "pipe", folder / "dangling"]
    return {path: _content(path) for path in planted}


def assert_untouched(planted: dict[Path, object]) -> None:
    """Checks that all planted files and folders are unchanged, byte for byte.

    Raises:
      Failure: if anything was changed or deleted. The message lists the paths.
    """
    changed = [str(path) for path, content in planted.items() if _content(path) != content]
    if changed:
        raise Failure(f"changed or deleted: {', '.join(changed)}")


def _write(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randint(0, 3000)))


def _content(path: Path) -> object:
    """Returns a file's bytes, a link's target, or the file type of any other entry; None if the path does not exist."""
    if not os.path.lexists(path):
        return None
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return os.readlink(path)
    return path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
