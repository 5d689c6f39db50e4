"""Looks up paths that users specify, and suggests corrections for misspelled paths."""

import difflib
import os
import re
from glob import glob
from pathlib import Path

HUB_PAGE = re.compile(r"https?://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")
SHIPPED_CONFIGS = (  # in an installed package, and in a clone of the repository
    Path(__file__).parents[1] / "configs",
    Path(__file__).parents[2] / "configs",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
USE_LFS = "a Git-LFS pointer, not the file itself; run `git lfs pull` in its folder"


def look_up(path: str, folder: Path) -> str:
    """Returns a path unchanged if it exists, otherwise the path inside `folder` if that exists.

    Absolute paths, and paths that exist in neither place, are returned unchanged.

    Args:
      path: a file or folder, a glob, or one of these with `#split` at the end.
      folder: the folder to search after the working directory.
    """
    beside = str(folder / Path(path).expanduser())
    return beside if not _exists(path) and _exists(beside) else path


def find_config(path: str | Path) -> Path:
    """Returns the path itself if it exists, otherwise the path of the shipped config with that name, if there is one.

    >>> find_config("smoke_cpu").name
    'smoke_cpu.yaml'
    """
    path = Path(path)
    if not _exists(str(path)) and path.parent == Path():
        for folder in SHIPPED_CONFIGS:
            shipped = folder / f"{path.stem}.yaml"
            if shipped.is_file():
                return shipped
    return path


def similar_config(path: Path) -> str:
    """Returns a hint with the shipped config that has a similar name, or an empty string."""
    names = [file.stem for folder in SHIPPED_CONFIGS for file in folder.glob("*.yaml")]
    close = difflib.get_close_matches(path.stem, names, n=1)
    return f"; did you mean the shipped config {close[0]}?" if close else ""


def did_you_mean(path: str) -> str:
    """Returns a hint for a path that does not exist, such as `"; did you mean data/train.jsonl?"`.

    The hint is a similar path that exists, the Hub id if the path is the URL of a Hub page, or a YAML list if the path
    consists of several paths separated by commas of which some exist. For a dangling symbolic link, the hint names its
    target. If none of these applies, the hint is empty.
    """
    if page := HUB_PAGE.match(path):
        return f"; did you mean {page[1]}?"
    parts = path.split(",")
    if len(parts) > 1 and all(map(_exists, parts)):
        return f"; did you mean [{', '.join(parts)}]?"
    if len(parts) > 1 and any(map(_exists, parts)):
        absent = " and ".join(part for part in parts if not _exists(part))
        return f"; write a list of files as [{', '.join(parts)}]; {absent} does not exist"
    whole = missing = Path(path).expanduser()
    if whole.is_symlink():
        return f"; it is a symbolic link to {os.readlink(whole)}, which does not exist"
    try:
        # The first part that does not exist is the misspelled one.
        while not missing.parent.exists():
            missing = missing.parent
        names = sorted(os.listdir(missing.parent))
        close = [name for name in names if Path(name).stem == missing.stem]
        close += difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    except (OSError, ValueError):  # not readable, or not a valid name
        return ""
    if not close:
        return ""
    found = missing.with_name(close[0])
    rest = found / whole.relative_to(missing)
    return f"; did you mean {rest if rest.exists() else found}?"


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer, a placeholder for a file that was not downloaded."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def working_directory(path: Path) -> str:
    """Returns `" in DIRECTORY"` for an error about a relative path, or an empty string for an absolute path."""
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
