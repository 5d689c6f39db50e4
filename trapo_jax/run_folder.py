"""A run's folder: whose it is, and how files get into it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trapo_jax.types import UserError

LOCK = ".lock"


def check_run_folder(folder: Path, config_text: str) -> None:
    """Refuses a folder that holds something else or another run; nothing is created here.

    Raises:
      UserError: naming the folder and the field that differs.
    """
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder}: a file is in the way")
    if saved.is_file():
        theirs = yaml.safe_load(saved.read_text())
        ours = yaml.safe_load(config_text)
        theirs, ours = flatten(theirs), flatten(ours)
        for field in sorted({*theirs, *ours} - {"output_dir"}):
            there, here = theirs.get(field, "absent"), ours.get(field, "absent")
            if there != here:
                raise UserError(
                    f"output_dir={folder}: holds a run with {field}={there}, not {here}; "
                    f"give another output_dir, or {field}={there} to resume it"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output_dir={folder}: not empty and not a run; give another output_dir")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir={folder}: {parent} is not writable")


def prepare_run_folder(folder: Path, config_text: str) -> None:
    """Makes the folder and writes the resolved config, where they are not there yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            write_atomically(folder / "config.yaml", config_text)
    except OSError as error:
        raise UserError(f"output_dir={folder}: {error.strerror}") from error


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder for as long as this one is at work there, even if it is killed.

    Raises:
      UserError: if another process is at work.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"output_dir={folder}: another process is training there; wait for its end or give "
            "another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names, as the command line has them."""
    flat = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
