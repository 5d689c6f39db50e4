"""Loads a checkpoint's model without the rest of the train state."""

from pathlib import Path
from typing import Any

import jax

from trapo_jax.config import Config, ModelConfig, load_config
from trapo_jax.distributed.sharding import abstract_like
from trapo_jax.models import DecoderConfig, abstract_params, find_model, read_decoder
from trapo_jax.runs.checkpoints import CheckpointStore, DamagedCheckpoint, ForeignCheckpoint
from trapo_jax.runs.directory import CHECKPOINTS, CONFIG, MODEL
from trapo_jax.types import UserError


def load_checkpoint(path: Path) -> tuple[Any, DecoderConfig, Path]:
    """Loads the parameters of a checkpoint.

    Args:
      path: `RUN/checkpoints/STEP`.

    Returns:
      The parameters on the default device, the decoder config, and the folder that contains the model's config and
      tokenizer: the run's copy or, for older runs, the model folder that the run started from.

    Raises:
      UserError: if the path is not a checkpoint of a run, or the checkpoint is damaged.
    """
    store = CheckpointStore(path.absolute().parent)
    saved_config = path.absolute().parents[1] / CONFIG
    if not path.name.isdecimal() or not saved_config.is_file():
        raise UserError(
            f"{path}: not a checkpoint of a run; specify a path of the form RUN/checkpoints/STEP"
        )
    step = int(path.name)
    if step not in store.steps():
        existing = ", ".join(map(str, store.steps())) or "none"
        raise UserError(f"{path}: no such checkpoint; existing steps: {existing}")
    config = load_config(Config, saved_config, [])
    copy = path.absolute().parents[1] / MODEL
    source = copy if copy.is_dir() else find_model(config.model.path)
    decoder = read_decoder(source, ModelConfig(), config.lora)
    abstract = abstract_params(decoder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = abstract_like(abstract, jax.tree.map(lambda _: device, abstract))
    try:
        store.verify(step)
    except (DamagedCheckpoint, ForeignCheckpoint) as error:
        raise UserError(f"{path}: {error}; choose the checkpoint of a different step") from error
    return store.restore_params(step, placed), decoder, source


def saved_model_files(folder: Path) -> Path | None:
    """Returns the folder with a run's copy of the model config and tokenizer; None before the first checkpoint."""
    copy = folder / MODEL
    try:
        return copy if copy.is_dir() and CheckpointStore(folder / CHECKPOINTS).steps() else None
    except OSError:  # `check_run_folder` reports what is wrong with the name.
        return None
