"""A pretrained model in a Hugging Face folder: its path, the shape of its decoder, and its tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo_jax.config import LoraConfig, ModelConfig
from trapo_jax.models.decoder import DecoderConfig
from trapo_jax.models.generation_config import read_eos_ids
from trapo_jax.models.hugging_face import find_model, locate_model
from trapo_jax.models.hugging_face_config import read_config, read_max_context_len
from trapo_jax.models.lora import Lora
from trapo_jax.models.side_files import replaced_folder, write_side_files
from trapo_jax.models.tokenizer import check_token_ids, load_tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """An opened model folder. Its parameters are loaded separately.

    Attributes:
      folder: the Hugging Face folder with the weights.
      files: the folder with the config and the tokenizer: `folder`, or a copy of its small files.
      decoder: the decoder's shape and how it is computed.
      tokenizer: the tokenizer of the folder.
      eos_ids: token ids that end a completion.
      max_context_len: number of tokens of prompt and completion that the model is made for; None if unknown.
    """

    folder: Path
    files: Path
    decoder: DecoderConfig
    tokenizer: Any  # PreTrainedTokenizerFast, whose annotations do not fit its use
    eos_ids: Sequence[int]
    max_context_len: int | None


def open_model(
    model: ModelConfig, lora: LoraConfig | None = None, *, files: Path | None = None
) -> PretrainedModel:
    """Opens the model folder of a config.

    Args:
      model: the config's section of the model.
      lora: the config's section of the adapters.
      files: a copy of the folder's small files, written by `copy_model_files`. The folder itself is then not read, and
        may be gone. None: the config and the tokenizer are read from the folder.

    Raises:
      UserError: if the folder does not exist, or its config or tokenizer is not supported.
    """
    folder = find_model(model.path) if files is None else locate_model(model.path)
    files = files or folder
    decoder = read_decoder(files, model, lora)
    tokenizer: Any = load_tokenizer(files)
    check_token_ids(files, tokenizer, vocab_size=decoder.vocab_size)
    return PretrainedModel(
        folder=folder,
        files=files,
        decoder=decoder,
        tokenizer=tokenizer,
        eos_ids=read_eos_ids(files, tokenizer.eos_token_id, vocab_size=decoder.vocab_size),
        max_context_len=read_max_context_len(files),
    )


def copy_model_files(model: PretrainedModel, destination: Path) -> None:
    """Copies the small files of a model, for `open_model` and `export_model`: all of its folder but the weights.

    Args:
      model: the model.
      destination: the copy; it is replaced if it exists, and appears complete or not at all.

    Raises:
      UserError: if the copy cannot be written.
    """
    with replaced_folder(destination) as folder:
        write_side_files(model.files, folder, model.decoder, eos_ids=model.eos_ids)


def read_decoder(folder: Path, model: ModelConfig, lora: LoraConfig | None = None) -> DecoderConfig:
    """Returns the decoder config of a model folder, with the compute options and adapters of the given configs."""
    adapters = Lora(lora.rank, lora.alpha, lora.targets) if lora and lora.rank else None
    return read_config(
        folder, dtype=model.dtype, remat=model.remat, attention=model.attention, lora=adapters
    )
