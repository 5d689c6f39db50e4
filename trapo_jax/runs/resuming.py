"""Decides whether a run may be started or resumed in a directory, and names every field that prevents it."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trapo_jax.config import (
    Config,
    DataConfig,
    SourceFile,
    as_override,
    flatten,
    is_changeable,
    list_fields,
    read_yaml,
    user_code,
)
from trapo_jax.config.schema import DATA_FILES
from trapo_jax.inputs.files import check_regular, read_json_object
from trapo_jax.methods import Method, fingerprint
from trapo_jax.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    DATA,
    FILES,
    FOLDERS,
    IDENTITY,
    LOCK,
    METHOD,
    NUM_STEPS,
    SUMMARY,
    USER_CODE,
    Changes,
    damaged,
)
from trapo_jax.types import UserError

ABSENT = "absent"  # Used as the value of a field that is missing from a config.
_HASH = re.compile(r"-[0-9a-f]{8}$")  # The settings hash at the end of a default `output_dir`.
PATHS = ("model.path", *(f"data.{name}" for name in DATA_FILES))
DECAY_START, METHOD_NAME = "train.decay_start", "method.name"


class RunStatus(NamedTuple):
    """The state of a run directory before a process opens it.

    Attributes:
      changes: fields that differ from the config of the run in the directory; see `check_run_folder`.
      is_complete: whether the run is complete and has not been extended.
      is_new: whether the directory does not contain a run yet.
    """

    changes: Changes
    is_complete: bool
    is_new: bool


def check_run_folder(
    folder: Path,
    config_text: str,
    *,
    method: dict[str, Any] | None = None,
    depends_on_length: bool = False,
    code: Sequence[SourceFile] = (),
) -> Changes:
    """Checks that a run can be started or resumed in a folder, without writing to it.

    Args:
      folder: the run directory.
      config_text: the resolved config as YAML.
      method: the fingerprint of the method; None to skip the comparison of methods.
      depends_on_length: whether the method depends on the length of the run.
      code: the user's modules; empty to skip their comparison.

    Returns:
      The fields that differ from the config of the run in the folder, except for `output_dir`. Each of them is
      `train.num_steps` or in `CHANGEABLE_FIELDS`. `train.num_steps` may differ only if nothing depends on the length of
      the run, and may not be below the step of the newest checkpoint.

    Raises:
      UserError: if the folder contains a different run or other files, or cannot be written to.
    """
    saved = folder / CONFIG
    changes: Changes = {}
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # Raises for an invalid name, for which `exists` would return False.
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir={folder}: not a directory; choose a different output_dir")
        if saved.is_file():
            _check_entries(folder)
            # A field such as data.task_options is compared as a whole.
            leaves = {field.name for field in list_fields(Config)}
            old = flatten(read_yaml(saved), leaves=leaves)
            new = flatten(yaml.safe_load(config_text), leaves=leaves)
            changes = _changes(folder, old, new, depends_on_length)
            _check_method(folder, method)
            _check_code(folder, code)
        elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(
                f"output_dir={folder}: neither empty nor a run directory; choose a different output_dir"
            )
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:  # ValueError if the name contains a NUL character.
        raise UserError(f"output_dir={folder}: {getattr(error, 'strerror', error)}") from error
    if not parent.is_dir():
        raise UserError(f"output_dir={folder}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir={folder}: {parent} is not writable")
    return changes


def check_run(config: Config, method: Method) -> RunStatus:
    """Checks that a run can be started or resumed with this config and method; see `check_run_folder`."""
    folder = config.run_folder
    changes = check_run_folder(
        folder,
        config.to_yaml(),
        method=fingerprint(method),
        depends_on_length=method.depends_on_length,
        code=user_code(config),
    )
    return RunStatus(
        changes,
        is_complete=(folder / SUMMARY).exists() and NUM_STEPS not in changes,
        is_new=not (folder / CONFIG).exists(),
    )


def unfinished_beside(folder: Path) -> Path | None:
    """Returns the most recent unfinished run next to `folder` that has the same name except for the settings hash."""
    stem = _HASH.sub("", folder.name)
    similar = [
        path
        for path in folder.parent.glob(f"{glob.escape(stem)}*")
        if path != folder and _HASH.sub("", path.name) == stem
    ]
    runs = [p for p in similar if (p / CONFIG).is_file() and not (p / SUMMARY).exists()]
    return max(runs, key=lambda path: (path / CONFIG).stat().st_mtime, default=None)


def _check_method(folder: Path, method: dict[str, Any] | None) -> None:
    """Checks that the run in a folder was trained with the same method, not just with one of the same name."""
    if method is None:
        return
    try:
        saved = read_json_object(folder / METHOD)
        name = saved["name"]
    except (UserError, KeyError) as error:
        raise damaged(folder / METHOD, error) from error
    if saved == method:
        return
    if name != method["name"]:
        raise UserError(
            f"output_dir={folder}: contains a run of method {name}, not {method['name']}; choose a different output_dir"
        )
    different = ", ".join(name for name in method if saved.get(name) != method[name])
    raise UserError(
        f"output_dir={folder}: contains a run of a different version of method {method['name']} (differs in "
        f"{different}); choose a different output_dir"
    )


def _check_code(folder: Path, code: Sequence[SourceFile]) -> None:
    """Checks that the user's modules have not changed since they produced the results in a folder.

    The check is skipped if the folder has no hashes, or if it contains a run without checkpoints, because such a run
    starts from the beginning.
    """
    file = folder / USER_CODE
    is_run = (folder / IDENTITY).exists()
    if not file.is_file() or (is_run and not any((folder / CHECKPOINTS).glob("[0-9]*"))):
        return
    try:
        saved = read_json_object(file)
    except UserError:
        saved = {}
    if changed := [source.path for source in code if saved.get(source.module) != source.sha256]:
        names = " and ".join(map(str, changed))
        raise UserError(
            f"output_dir={folder}: {names} changed since the run started; undo the changes, choose a different "
            f"output_dir, or delete {file} to continue with the changed code"
        )


def _changes(
    folder: Path, saved: dict[str, Any], current: dict[str, Any], depends_on_length: bool
) -> Changes:
    changes: Changes = {}
    refused: Changes = {}
    reason = ""
    # The method comes first: if it differs, so do its hyperparameters, but the error should name only the method.
    fields = sorted({*saved, *current} - {"output_dir"}, key=lambda x: (x != METHOD_NAME, x))
    for field in fields:
        old, new = saved.get(field, ABSENT), current.get(field, ABSENT)
        if old == new or (field in PATHS and _absolute(old) == _absolute(new)):
            continue
        is_length = field == NUM_STEPS and isinstance(old, int) and isinstance(new, int)
        dependent = _length_dependency(current, depends_on_length) if is_length else ""
        if dependent:
            reason = f"; {dependent} depends on the length of the run"
        may_change = is_changeable(field) or (is_length and not dependent)
        (changes if may_change else refused)[field] = (old, new)
    if METHOD_NAME in refused:  # Listing the other method's hyperparameters would add nothing.
        refused = {f: v for f, v in refused.items() if f == METHOD_NAME or "method." not in f}
    if refused:
        raise UserError(_refusal(folder, refused, reason))
    if NUM_STEPS in changes:
        _check_length(folder, changes[NUM_STEPS][1])
    return changes


def _check_length(folder: Path, num_steps: int) -> None:
    """Checks that a run has not already completed more than `num_steps` steps."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("[0-9]*")]
    completed = max((int(name) for name in names if name.isdecimal()), default=0)
    if num_steps < completed:
        raise UserError(
            f"output_dir={folder}: {NUM_STEPS}={num_steps}, but the run has completed {completed} steps; set "
            f"{NUM_STEPS} to {completed} or more, or choose a different output_dir"
        )


def _refusal(folder: Path, refused: Changes, reason: str) -> str:
    """Returns an error message that names every field that prevents a run from being resumed."""
    if "weights" in refused:  # not a config field; recorded only by evaluations
        return f"output_dir={folder}: contains an evaluation of a model with other weights; choose a different output_dir"
    versions = [field for field, values in refused.items() if ABSENT in values]
    if versions:
        listed = ", ".join(
            f"{'lacks' if refused[field][0] == ABSENT else 'has'} the field {field}"
            for field in versions
        )
        return (
            f"output_dir={folder}: contains a run of a different version of trapo_jax (its config {listed}); choose a "
            "different output_dir"
        )
    differences = ", ".join(
        f"{field}={_as_yaml(old)}, not {_as_yaml(new)}" for field, (old, new) in refused.items()
    )
    settings = " ".join(as_override(field, old) for field, (old, _) in refused.items())
    return (
        f"output_dir={folder}: contains a run with {differences}{reason}; choose a different output_dir, or set "
        f"{settings} to resume the run"
    )


def _absolute(paths: Any) -> Any:
    """Returns absolute paths for a path or a list of paths, and any other value unchanged."""
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    return os.path.abspath(os.path.expanduser(paths)) if isinstance(paths, str) else paths


def _as_yaml(value: Any) -> str:
    """Formats a value for the command line, with null, true and false instead of None, True and False."""
    return json.dumps(value) if value is None or isinstance(value, bool | dict) else str(value)


def _length_dependency(config: dict[str, Any], depends_on_length: bool) -> str:
    """Names the setting that depends on the length of the run, for an error message; empty if none does."""
    if depends_on_length:
        return f"{METHOD_NAME}={config[METHOD_NAME]}"
    start = config[DECAY_START]
    return f"with {DECAY_START}={start}, the learning rate" if start != 1 else ""


def _check_entries(folder: Path) -> None:
    """Checks that a run's files and folders have the right type. Opening a named pipe, for example, would block."""
    for name in FOLDERS:
        path = folder / name
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{path}: not a folder, but a run needs a folder there; rename it or choose a different output_dir"
            )
    for name in FILES:
        if (folder / name).exists():
            check_regular(folder / name)


def check_problems(folder: Path, data: DataConfig, *, saved: str, current: str) -> None:
    """Checks that the training problems have not changed since a run started.

    Args:
      folder: the run directory.
      data: the data config.
      saved: the problem fingerprint in the checkpoint.
      current: the fingerprint of the current problems.

    Raises:
      UserError: if the fingerprints differ. The message names the config field that selects the data.
    """
    if saved == current:
        return
    is_generated = data.source != "files"
    name = f"source={data.source}" if is_generated else f"train_files={', '.join(data.train_files)}"
    raise UserError(
        f"output_dir={folder}: the problems of data.{name} changed since the run started (see {DATA}); restore the "
        "data or choose a different output_dir"
    )
