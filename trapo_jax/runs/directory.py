"""Defines the run directory: its files, its identity, its lock, and how files are written to it."""

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
    SourceFile,
    flatten,
    is_changeable,
)
from trapo_jax.distributed.processes import gather
from trapo_jax.inputs.files import read_json_object
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

NUM_STEPS = "train.num_steps"  # May change if nothing depends on the run's length.
SHARED_AFTER_SECS = 60  # Maximum time until all hosts see a new file on shared storage.

Changes = dict[str, tuple[Any, Any]]  # Old and new values, keyed by field.


def damaged(path: Path, error: UserError | KeyError) -> UserError:
    """Returns the error for a missing or damaged file that is needed to resume a run."""
    what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
    what = what.removeprefix(f"{path}: ")
    return UserError(
        f"{path}: missing or damaged ({what}), so the run cannot be resumed; restore the file or choose a different "
        "output_dir"
    )


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
      data_summary: the contents of data.json; None if the file should not be written.
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
        raise damaged(folder / IDENTITY, error) from error
    fixed = {
        field: value
        for field, value in flatten(yaml.safe_load(config_text)).items()
        if field != NUM_STEPS and not is_changeable(field)
    }
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode())
    return {"id": str(name), "config": digest.hexdigest()[:16]}


def check_shared(folder: Path, run_id: str) -> None:
    """Checks that all processes of the job see the run directory prepared by process 0.

    All processes must call this function.

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


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Creates the folder and locks it for this process. The lock is released even if the process is killed.

    Commands hold the lock of a folder for as long as they write to it. An `OSError` without a file name is given the
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
