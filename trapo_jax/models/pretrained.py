"""Opens pretrained models in Hugging Face folders, and reads their decoder shapes and tokenizers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo_jax.config import LoraConfig, ModelConfig
from trapo_jax.inputs.files import read_json_object
from trapo_jax.inputs.hub import HubRepo, parse_hub_id
from trapo_jax.models.decoder import DecoderConfig
from trapo_jax.models.generation_config import read_eos_ids
from trapo_jax.models.hugging_face_config import read_config, read_max_context_len
from trapo_jax.models.location import fetch_small_files, fetch_weights, locate_model
from trapo_jax.models.lora import Lora
from trapo_jax.models.side_files import replaced_folder, write_side_files
from trapo_jax.models.tensor_files import has_own_head
from trapo_jax.models.tokenizer import load_tokenizer
from trapo_jax.types import UserError

HUB = "hub.json"  # the name and commit of a Hub model, in a run's copy of its files


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """An opened model folder. Its parameters are loaded separately.

    Attributes:
      folder: the Hugging Face folder with the weights. For a Hub model, the folder contains them only after
        `with_weights`.
      files: the folder with the config and the tokenizer: `folder`, or a copy of its small files.
      decoder: the decoder's shape and compute options.
      tokenizer: the tokenizer of the folder.
      eos_ids: token ids that end a completion.
      max_context_len: maximum length of prompt plus completion that the model supports, in tokens; None if unknown.
      repo: the repository of a Hub model, pinned to a commit; None for a local folder.
    """

    folder: Path
    files: Path
    decoder: DecoderConfig
    tokenizer: Any  # a PreTrainedTokenizerFast; its annotations reject valid calls
    eos_ids: Sequence[int]
    max_context_len: int | None
    repo: HubRepo | None = None


def open_model(
    model: ModelConfig, lora: LoraConfig | None = None, *, files: Path | None = None
) -> PretrainedModel:
    """Opens the configured model folder, downloading all files of a Hub model except its weights.

    Args:
      model: the model section of the config.
      lora: the adapter section of the config.
      files: a copy of the folder's small files, written by `copy_model_files`. The folder itself is then not read and
        need not exist. If None, the config and the tokenizer are read from the folder.

    Raises:
      UserError: if the folder does not exist, or its config or tokenizer is not supported.
    """
    folder, repo = locate_model(model.path, must_exist=files is None)
    if files:
        repo = _read_repo(files)
        folder = files if repo else folder
    elif repo:
        folder, repo = fetch_small_files(repo)
    files = files or folder
    decoder = read_decoder(files, model, lora)
    tokenizer: Any = load_tokenizer(files, vocab_size=decoder.vocab_size)
    return PretrainedModel(
        folder=folder,
        files=files,
        decoder=decoder,
        tokenizer=tokenizer,
        eos_ids=read_eos_ids(files, tokenizer.eos_token_id, vocab_size=decoder.vocab_size),
        max_context_len=read_max_context_len(files),
        repo=repo,
    )


def with_weights(model: PretrainedModel) -> PretrainedModel:
    """Returns the model with a folder that contains its weights, downloading the weights of a Hub model.

    Raises:
      UserError: if the weights are neither in the cache nor on the Hub.
    """
    if model.repo is None:
        return model
    folder = fetch_weights(model.repo)
    # Until now, `tied_embeddings` depended only on config.json; see `read_config`.
    tied = model.decoder.tied_embeddings and not has_own_head(folder)
    decoder = dataclasses.replace(model.decoder, tied_embeddings=tied)
    return dataclasses.replace(model, folder=folder, decoder=decoder)


def copy_model_files(model: PretrainedModel, destination: Path) -> None:
    """Copies a model's small files (all files except the weights), for `open_model` and `export_model`.

    Args:
      model: the model.
      destination: the new folder, written atomically; replaced if it exists.

    Raises:
      UserError: if the copy cannot be written.
    """
    with replaced_folder(destination) as folder:
        write_side_files(model.files, folder, model.decoder, eos_ids=model.eos_ids)
        if model.repo:
            origin = {"name": model.repo.name, "commit": model.repo.revision}
            (folder / HUB).write_text(json.dumps(origin) + "\n")


def _read_repo(copy: Path) -> HubRepo | None:
    """Returns the repository that `copy_model_files` copied from; None if it copied a local folder."""
    if not (copy / HUB).exists():
        return None
    origin = read_json_object(copy / HUB)
    repo = parse_hub_id(f"{origin.get('name')}@{origin.get('commit')}", "model")
    if repo is None:
        raise UserError(f"{copy / HUB}: expected the name and the commit of a Hub model")
    return repo


def read_decoder(folder: Path, model: ModelConfig, lora: LoraConfig | None = None) -> DecoderConfig:
    """Returns the decoder config of a model folder, with the compute options and adapters of the given configs.

    Raises:
      UserError: if the folder's config is not supported, or adapters of this rank would be larger than the weights.
    """
    adapters = Lora(lora.rank, lora.alpha, lora.targets) if lora and lora.rank else None
    decoder = read_config(
        folder, dtype=model.dtype, remat=model.remat, attention=model.attention, lora=adapters
    )
    if adapters and adapters.rank > decoder.width:
        raise UserError(
            f"lora.rank={adapters.rank}: exceeds the model's width of {decoder.width}; lower it"
        )
    return decoder
