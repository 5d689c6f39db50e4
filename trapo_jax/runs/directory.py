"""A run's folder: whose it is, what a resumed run may change, and how files get into it."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trapo_jax.config import CONFIG_FILE as CONFIG
from trapo_jax.types import UserError

LOCK = ".lock"
METHOD, CHANGES = "method.json", "changes.jsonl"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
DATA = (
    "data.json"  # fingerprint of the training data, chat template, what was dropped while reading
)
CHECKPOINTS = "checkpoints"  # folder with one folder per checkpoint
EVALUATIONS = "evaluations"  # folder with one file per evaluation; see `evaluation_file`
EXPORT = "hf"  # the trained model as a Hugging Face folder
SUMMARY = "summary.json"  # written last; marks a run as complete

# What a resumed run may change: where and how fast it computes, what it keeps and says, and when it stops or warns.
# What it computes stays the same, but for the rounding of sums and, with sampling.max_staleness, the clock. A name
# with a dot at its end is a whole section.
MAY_DIFFER = (
    "output_dir",
    "log_samples",
    "model.remat",
    "model.attention",
    "sampling.num_slots",
    "sampling.segment_len",
    "sampling.num_contexts",
    "sampling.prefill_tokens",
    "rewards.workers",
    "rewards.max_error_rate",
    "train.row_length",
    "train.per_device_rows",
    "train.logprob_chunk_size",
    "train.max_skipped_steps",
    "evaluation.every",
    "checkpoint.",
    "limits.",
    "mesh.",
)
NUM_STEPS, DECAY_START, METHOD_NAME = "train.num_steps", "train.decay_start", "method.name"

Changes = dict[str, tuple[Any, Any]]  # by field: what it was, what it is


def check_run_folder(
    folder: Path,
    config_text: str,
    *,
    method: dict[str, Any] | None = None,
    depends_on_length: bool = False,
) -> Changes:
    """Refuses a folder that holds something else or another run; nothing is created here.

    Args:
      folder: the run directory.
      config_text: the resolved config as YAML.
      method: the fingerprint of the run's method.
      depends_on_length: whether the method depends on the length of the run.

    Returns:
      The fields of `MAY_DIFFER` that a run in the folder was given otherwise, `output_dir` aside; and
      `train.num_steps`, if the run is to be longer and its learning rate does not depend on the length.

    Raises:
      UserError: naming the folder and the field that differs.
    """
    saved = folder / CONFIG
    changes: Changes = {}
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # `exists` would take a name that cannot be for one that is not there yet
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir={folder}: a file is in the way")
        if saved.is_file():
            ours = flatten(yaml.safe_load(config_text))
            changes = _changes(folder, _read_config(saved), ours, depends_on_length)
            _check_method(folder, method)
        elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(
                f"output_dir={folder}: not empty and not a run; give another output_dir"
            )
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise UserError(f"output_dir={folder}: {getattr(error, 'strerror', error)}") from error
    if not parent.is_dir():
        raise UserError(f"output_dir={folder}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir={folder}: {parent} is not writable")
    return changes


def _check_method(folder: Path, method: dict[str, Any] | None) -> None:
    """Refuses a run that was trained by another method, even if it has the same name."""
    if method is None:
        return
    try:
        saved = json.loads((folder / METHOD).read_text())
        name = saved["name"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder / METHOD}: not the method of a run ({type(error).__name__}), so that the run cannot be resumed; "
            "restore the file or give another output_dir"
        ) from error
    if saved == method:
        return
    if name != method["name"]:
        raise UserError(
            f"output_dir={folder}: holds a run of the method {name}, not {method['name']}; give another "
            "output_dir"
        )
    different = ", ".join(name for name in method if saved.get(name) != method[name])
    raise UserError(
        f"output_dir={folder}: holds a run of another version of the method {method['name']} ({different}); give "
        "another output_dir"
    )


def _changes(
    folder: Path, theirs: dict[str, Any], ours: dict[str, Any], depends_on_length: bool
) -> Changes:
    changes: Changes = {}
    # The name of the method first, because its constants differ with it.
    fields = sorted({*theirs, *ours} - {"output_dir"}, key=lambda x: (x != METHOD_NAME, x))
    for field in fields:
        there, here = theirs.get(field, "absent"), ours.get(field, "absent")
        if there == here:
            continue
        if "absent" in (there, here) and not _may_differ(field):
            raise UserError(
                f"output_dir={folder}: holds a run of another version, with other fields ({field}); "
                "give another output_dir"
            )
        is_longer = field == NUM_STEPS and isinstance(there, int) and here > there
        schedule = _schedule(ours, depends_on_length) if is_longer else ""
        if not (_may_differ(field) or (is_longer and not schedule)):
            reason = f"; {schedule} depends on it" if schedule else ""
            raise UserError(
                f"output_dir={folder}: holds a run with {field}={there}, not {here}{reason}; "
                f"give another output_dir, or {field}={there} to resume it"
            )
        changes[field] = (there, here)
    return changes


def _schedule(config: dict[str, Any], depends_on_length: bool) -> str:
    """Returns what depends on the length of the run; empty if nothing does."""
    if depends_on_length:
        return f"{METHOD_NAME}={config[METHOD_NAME]}"
    return f"its learning rate, unless {DECAY_START}=1," if config[DECAY_START] != 1 else ""


def _may_differ(field: str) -> bool:
    return any(field.startswith(x) if x.endswith(".") else field == x for x in MAY_DIFFER)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return flatten(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not the config of a run; give another output_dir") from error


def prepare_run_folder(
    folder: Path, config_text: str, *, method: dict[str, Any] | None = None
) -> None:
    """Creates the folder and writes the resolved config and the method's fingerprint, unless they exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CONFIG).exists():
            if method is not None:
                write_atomically(folder / METHOD, json.dumps(method, indent=2) + "\n")
            write_atomically(folder / CONFIG, config_text)
    except OSError as error:
        raise UserError(f"output_dir={folder}: {error.strerror}") from error


def record_changes(folder: Path, config_text: str, changes: Changes, *, after_step: int) -> None:
    """Puts the new config in the place of the old, and a line in `changes.jsonl` that says what is new."""
    record = {name: {"was": was, "is": now} for name, (was, now) in changes.items()}
    with open(folder / CHANGES, "a", encoding="utf-8") as file:
        file.write(json.dumps({"after_step": after_step, "changed": record}) + "\n")
    write_atomically(folder / CONFIG, config_text)


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder for as long as this one is at work there, even if it is killed.

    Raises:
      UserError: if another process is at work.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"output_dir={folder}: another process is training there; wait for its end or give "
            "another output_dir"
        ) from error
    except OSError as error:
        raise UserError(f"output_dir={folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def evaluation_file(folder: Path, split: str, step: int) -> Path:
    """Returns the file with the evaluation of a split after a step."""
    return folder / EVALUATIONS / f"{split}_{step}.json"


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
