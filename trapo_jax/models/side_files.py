"""Copies the small files of a Hugging Face folder: its config, tokenizer, and generation config."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from trapo_jax.inputs.files import read_json_object
from trapo_jax.models.decoder import DecoderConfig
from trapo_jax.models.generation_config import GENERATION_CONFIG, write_eos_ids
from trapo_jax.models.tensor_files import INDEX, weight_files
from trapo_jax.types import UserError

CONFIG = "config.json"
CHAT_TEMPLATES = "additional_chat_templates"  # a directory of templates other than the default
# Glob patterns for all files of a model except its config and weights. A pattern may match several files.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    f"{CHAT_TEMPLATES}/*.jinja",
    GENERATION_CONFIG,
)


def write_side_files(
    source: Path, folder: Path, config: DecoderConfig, *, eos_ids: Sequence[int] = ()
) -> None:
    """Writes all files of a Hugging Face folder except the weights.

    Args:
      source: the folder to copy from.
      folder: the folder to write to; it must exist.
      config: the model's shape; determines whether `config.json` ties the embeddings.
      eos_ids: token ids that end a completion, for `generation_config.json`; if empty, this file is copied unchanged.

    Raises:
      UserError: if `source/config.json` cannot be read.
    """
    model_config = read_json_object(source / CONFIG)
    model_config.pop("torch_dtype", None)
    model_config.pop("auto_map", None)  # An exported config must not refer to custom code.
    model_config["dtype"] = "float32"
    model_config["tie_word_embeddings"] = config.tied_embeddings
    (folder / CONFIG).write_text(json.dumps(model_config, indent=2) + "\n")
    for path in (path for pattern in SIDE_FILES for path in sorted(source.glob(pattern))):
        copy = folder / path.relative_to(source)
        if path.is_file():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if eos_ids:
        write_eos_ids(folder, eos_ids)


@contextlib.contextmanager
def replaced_folder(destination: Path) -> Iterator[Path]:
    """Yields an empty folder whose files are moved to `destination` on exit, unless an error occurs.

    In an existing destination, weight files of the old model are deleted, and all other files that are not overwritten
    are kept. While files are moved, the destination has no config, so that nothing loads a mixture of both models.

    Raises:
      UserError: if the folder cannot be written.
    """
    staging = destination.with_name(destination.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        if destination.exists():
            _move_files(staging, destination)
        else:
            os.rename(staging, destination)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{destination}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_files(source: Path, destination: Path) -> None:
    """Moves all files of a model folder to another model folder, and deletes the old weights that remain there."""
    new = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    stale = {*map(Path, weight_files(destination)), Path(INDEX)} - {*new}
    (destination / CONFIG).unlink(missing_ok=True)
    for name in stale:
        (destination / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == Path(CONFIG)):  # The config comes last.
        (destination / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, destination / name)
