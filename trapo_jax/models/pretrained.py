"""A pretrained model in a Hugging Face folder: its path, the shape of its decoder, and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from trapo_jax.config import LoraConfig, ModelConfig
from trapo_jax.models.decoder import DecoderConfig
from trapo_jax.models.hugging_face import find_model
from trapo_jax.models.hugging_face_config import read_config, read_eos_ids
from trapo_jax.models.lora import Lora
from trapo_jax.models.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """An opened model folder. Its parameters are loaded separately.

    Attributes:
      folder: the Hugging Face folder.
      decoder: the decoder's shape and how it is computed.
      tokenizer: the tokenizer of the folder.
    """

    folder: Path
    decoder: DecoderConfig
    tokenizer: Any  # PreTrainedTokenizerFast, whose type annotations are too strict for our use

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end a completion."""
        return read_eos_ids(self.folder, self.tokenizer.eos_token_id)


def open_model(model: ModelConfig, lora: LoraConfig | None = None) -> PretrainedModel:
    """Opens the model folder of a config.

    Raises:
      UserError: if the folder does not exist, or its config or tokenizer is not supported.
    """
    folder = find_model(model.path)
    return PretrainedModel(folder, read_decoder(folder, model, lora), load_tokenizer(folder))


def read_decoder(folder: Path, model: ModelConfig, lora: LoraConfig | None = None) -> DecoderConfig:
    """Returns the decoder config of a model folder, with the compute options and adapters of the given configs."""
    adapters = Lora(lora.rank, lora.alpha, lora.targets) if lora and lora.rank else None
    return read_config(
        folder, dtype=model.dtype, remat=model.remat, attention=model.attention, lora=adapters
    )
