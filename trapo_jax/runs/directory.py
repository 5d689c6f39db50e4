"""Defines the run directory: its files, its lock, and the checks that decide whether a run may be resumed in it."""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trapo_jax.config import CONFIG_FILE as CONFIG
from trapo_jax.config import (
    Config,
    DataConfig,
    SourceFile,
    flatten,
    is_changeable,
    read_yaml,
    user_code,
)
from trapo_jax.distributed.processes import gather
from trapo_jax.files import check_regular, read_json_object
from trapo_jax.methods import Method, fingerprint
from trapo_jax.runs.system_errors import named_in_errors
from trapo_jax.types import UserError

LOCK = ".lock"
METHOD, CHANGES = "method.json", "changes.jsonl"
USER_CODE = "user_code.json"  # Hashes of the user's modules that the config refers to, if any.
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
IDENTITY = "run.json"  # A random run id, used to detect checkpoints of other runs.
DATA = "data.json"  # The training-data fingerprint, chat template and dropped problems.
CHECKPOINTS = "checkpoints"  # A directory with one subdirectory per checkpoint.
EVALUATIONS = "evaluations"  # A directory with one file per evaluation; see `evaluation_file`.
MODEL = "model"  # A copy of the model's config and tokenizer, without weights.
EXPORT = "hf"  # The trained model in Hugging Face format.
SUMMARY = "summary.json"  # Written last; marks a run as complete.
REPORT = "report.html"
TENSORBOARD = "tb"
FOLDERS = (CHECKPOINTS, EVALUATIONS, MODEL, EXPORT, TENSORBOARD)
FILES = (LOCK, METHOD, USER_CODE, CHANGES, METRICS, SAMPLES, IDENTITY, DATA, SUMMARY, REPORT)

ABSENT = "absent"  # Stands for the value of a field that is missing from a config.
SHARED_AFTER_SECS = 60  # Maximum time until all hosts see a new file on shared storage.
NUM_STEPS, DECAY_START, METHOD_NAME = "train.num_steps", "train.decay_start", "method.name"

Changes = dict[str, tuple[Any, Any]]  # Old and new values, keyed by field.


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
      The fields that differ from the config of the run in the folder, except for `output_dir`. All of them are in
      `CHANGEABLE_FIELDS`, apart from `train.num_steps`. If nothing depends on the length of the run, it may be any
      number that is not below the step of the newest checkpoint.

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
            current = flatten(yaml.safe_load(config_text))
            changes = _changes(folder, flatten(read_yaml(saved)), current, depends_on_length)
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


def check_run(config: Config, method: Method) -> Changes:
    """Checks that a run can be started or resumed with this config and method; see `check_run_folder`."""
    return check_run_folder(
        config.run_folder,
        config.to_yaml(),
        method=fingerprint(method),
        depends_on_length=method.depends_on_length,
        code=user_code(config),
    )


def _check_method(folder: Path, method: dict[str, Any] | None) -> None:
    """Checks that the run in a folder was trained with the same method, not just one of the same name."""
    if method is None:
        return
    try:
        saved = read_json_object(folder / METHOD)
        name = saved["name"]
    except (UserError, KeyError) as error:
        raise _damaged(folder / METHOD, error) from error
    if saved == method:
        return
    if name != method["name"]:
        raise UserError(
            f"output_dir={folder}: contains a run of method {name}, not {method['name']}; choose a different "
            "output_dir"
        )
    different = ", ".join(name for name in method if saved.get(name) != method[name])
    raise UserError(
        f"output_dir={folder}: contains a run of a different version of method {method['name']} (differs in {different}); "
        "choose a different output_dir"
    )


def _check_code(folder: Path, code: Sequence[SourceFile]) -> None:
    """Checks that the user's modules have not changed since they produced the results in a folder.

    The check is skipped if the folder has no hashes, or has a run without checkpoints, which starts from the beginning.
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
    # The method comes first: if it differs, so do its constants, but the error should name only the method.
    fields = sorted({*saved, *current} - {"output_dir"}, key=lambda x: (x != METHOD_NAME, x))
    for field in fields:
        old, new = saved.get(field, ABSENT), current.get(field, ABSENT)
        if old == new:
            continue
        is_length = field == NUM_STEPS and isinstance(old, int) and isinstance(new, int)
        dependent = _length_dependency(current, depends_on_length) if is_length else ""
        if dependent:
            reason = f"; {dependent} depends on the length of the run"
        may_change = is_changeable(field) or (is_length and not dependent)
        (changes if may_change else refused)[field] = (old, new)
    if METHOD_NAME in refused:  # Listing the other method's constants would add nothing.
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
            f"{NUM_STEPS}={completed} or more, or choose a different output_dir"
        )


def _refusal(folder: Path, refused: Changes, reason: str) -> str:
    """Returns an error message that names every field that keeps a run from being resumed."""
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
    settings = " ".join(f"{field}={_as_yaml(old)}" for field, (old, _) in refused.items())
    return (
        f"output_dir={folder}: contains a run with {differences}{reason}; choose a different output_dir, or set "
        f"{settings} to resume the run"
    )


def _as_yaml(value: Any) -> str:
    """Formats a value for the command line: null, true and false rather than Python's names."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _length_dependency(config: dict[str, Any], depends_on_length: bool) -> str:
    """Names the setting that depends on the length of the run, for an error message; empty if none does."""
    if depends_on_length:
        return f"{METHOD_NAME}={config[METHOD_NAME]}"
    start = config[DECAY_START]
    return f"with {DECAY_START}={start}, the learning rate" if start != 1 else ""


def _damaged(path: Path, error: UserError | KeyError) -> UserError:
    """Returns the error for a missing or damaged file that is needed to resume a run."""
    what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
    what = what.removeprefix(f"{path}: ")
    return UserError(
        f"{path}: missing or damaged ({what}), so the run cannot be resumed; restore the file or choose a different "
        "output_dir"
    )


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


def prepare_run_folder(
    folder: Path,
    config_text: str,
    *,
    method: dict[str, Any] | None = None,
    data_summary: Mapping[str, Any] | None = None,
    code: Sequence[SourceFile] = (),
) -> None:
    """Creates the folder, writes its missing files, and updates the hashes of the user's modules.

    Args:
      folder: the run directory.
      config_text: the resolved config as YAML.
      method: the fingerprint of the method, if there is one.
      data_summary: the contents of data.json; None to write no such file.
      code: the user's modules.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CONFIG).exists():
            if method is not None:
                write_atomically(folder / IDENTITY, json.dumps({"id": secrets.token_hex(8)}) + "\n")
                write_atomically(folder / METHOD, json.dumps(method, indent=2) + "\n")
            write_atomically(folder / CONFIG, config_text)
        if data_summary is not None and not (folder / DATA).exists():
            write_atomically(folder / DATA, json.dumps(data_summary, indent=2) + "\n")
        if code:
            hashes = {source.module: source.sha256 for source in code}
            write_atomically(folder / USER_CODE, json.dumps(hashes, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir={folder}: {error.strerror}") from error


def run_identity(folder: Path, config_text: str) -> dict[str, str]:
    """Returns the id of a run and a hash of the config fields that cannot change.

    Raises:
      UserError: if the file that contains the id is missing or damaged.
    """
    try:
        name = read_json_object(folder / IDENTITY)["id"]
    except (UserError, KeyError) as error:
        raise _damaged(folder / IDENTITY, error) from error
    fixed = {
        field: value
        for field, value in flatten(yaml.safe_load(config_text)).items()
        if field != NUM_STEPS and not is_changeable(field)
    }
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode())
    return {"id": str(name), "config": digest.hexdigest()[:16]}


def check_shared(folder: Path, run_id: str) -> None:
    """Checks that all processes of the job see the run directory prepared by process 0. All must call this.

    Raises:
      UserError: in all processes, if any process does not see the directory.
    """
    # Network file systems cache the absence of a file for a while.
    deadline = time.monotonic() + SHARED_AFTER_SECS
    while not (is_same := _is_run(folder, run_id)) and time.monotonic() < deadline:
        time.sleep(1)
    if not all(gather(is_same)):
        raise UserError(
            f"output_dir={folder}: not the same directory in all processes; choose one on storage shared by all hosts"
        )


def _is_run(folder: Path, run_id: str) -> bool:
    try:
        return read_json_object(folder / IDENTITY)["id"] == run_id
    except (UserError, KeyError):
        return False


def record_changes(folder: Path, config_text: str, changes: Changes, *, after_step: int) -> None:
    """Replaces the saved config and appends the changes to `changes.jsonl`."""
    record = {name: {"was": was, "is": now} for name, (was, now) in changes.items()}
    with open(folder / CHANGES, "a", encoding="utf-8") as file:
        file.write(json.dumps({"after_step": after_step, "changed": record}) + "\n")
    write_atomically(folder / CONFIG, config_text)


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
        f"output_dir={folder}: the problems of data.{name} changed since the run started (see {DATA}); restore the data or "
        "choose a different output_dir"
    )


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Creates the folder and locks it for this process. The lock is released even if the process is killed.

    Commands hold the lock of a folder for as long as they write to it. System errors without a file name are given the
    folder's name.

    Args:
      folder: the folder.
      option: the config field or command-line option that selected the folder, for error messages.

    Raises:
      UserError: if another process holds the lock.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{option}={folder}: another process is writing to it; wait until it ends or choose a different {option}"
        ) from error
    except OSError as error:
        raise UserError(f"{option}={folder}: {error.strerror}") from error
    try:
        with named_in_errors(folder):
            yield
    finally:
        lock.release()


def evaluation_file(folder: Path, split: str, step: int) -> Path:
    """Returns the path of the file with the results of evaluating a split after a step."""
    return folder / EVALUATIONS / f"{split}_{step}.json"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that readers see either the old or the new content, never a mixture.

    If several processes write the file at the same time, the last one wins.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with named_in_errors(path):
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # Otherwise, the new name may be lost if the machine crashes.
        finally:
            os.close(descriptor)
