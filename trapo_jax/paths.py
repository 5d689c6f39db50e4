"""Paths that users give: where relative ones are looked up, and what a misspelled one may have meant."""

import difflib
import os
from glob import glob
from pathlib import Path


def look_up(path: str, folder: Path) -> str:
    """Returns where a path is: as it is given if that exists, and otherwise in a folder, if it exists there.

    An absolute path, and one that exists in neither place, is returned as it is given.

    Args:
      path: a file or folder, a glob, or one of these with `#split` at the end.
      folder: where to look after the working directory.
    """
    beside = str(folder / Path(path).expanduser())
    return beside if not _exists(path) and _exists(beside) else path


def did_you_mean(path: str | Path) -> str:
    """Returns a hint, `"; did you mean data/train.jsonl?"`, if a path that does not exist resembles one that does."""
    missing = Path(path)
    try:
        # The first part that does not exist is the misspelled one.
        while not missing.parent.exists():
            missing = missing.parent
        close = difflib.get_close_matches(missing.name, os.listdir(missing.parent), n=1)
    except (OSError, ValueError):  # not readable, or not a valid name
        return ""
    if not close:
        return ""
    found = missing.with_name(close[0])
    whole = found / Path(path).relative_to(missing)
    return f"; did you mean {whole if whole.exists() else found}?"


def working_directory(path: Path) -> str:
    """Returns `" in DIRECTORY"` for an error about a relative path; empty for an absolute one."""
    return "" if path.is_absolute() else f" in {os.getcwd()}"


def _exists(path: str) -> bool:
    whole, without_split = Path(path).expanduser(), Path(path.rpartition("#")[0] or path)
    try:
        return (
            whole.exists()
            or without_split.expanduser().exists()
            or (any(character in path for character in "*?[") and bool(glob(str(whole))))
        )
    except (OSError, ValueError):  # not readable, or not a valid name
        return False
