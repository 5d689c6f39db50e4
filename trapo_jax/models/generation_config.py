"""Reads and writes the token ids that end a completion, in the files of a Hugging Face folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from trapo_jax.inputs.files import read_json_object, shown
from trapo_jax.types import UserError

GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"


def read_eos_ids(folder: Path, tokenizer_eos_id: int, *, vocab_size: int) -> list[int]:
    """Returns the token ids that end a completion: the tokenizer's and the model's EOS ids.

    As in transformers, the model's ids come from `generation_config.json`, or from `config.json` if the former does not
    exist or lists no ids.

    Args:
      folder: the model folder.
      tokenizer_eos_id: id of the tokenizer's EOS token.
      vocab_size: number of rows in the embedding.

    Raises:
      UserError: if `eos_token_id` is neither an id below `vocab_size` nor a list of such ids.
    """
    files = (folder / name for name in (GENERATION_CONFIG, "config.json"))
    of_model = next((ids for path in files if (ids := _eos_ids_in(path, vocab_size))), [])
    return list(dict.fromkeys([tokenizer_eos_id, *of_model]))


def write_eos_ids(folder: Path, eos_ids: Sequence[int]) -> None:
    """Sets the EOS ids in `generation_config.json`, creating the file if it does not exist."""
    path = folder / GENERATION_CONFIG
    if path.exists():
        content = read_json_object(path)
    else:
        # Without the file, transformers would read these two ids from the config.
        config = read_json_object(folder / "config.json")
        content = {k: config[k] for k in ("bos_token_id", "pad_token_id") if k in config}
    content[EOS] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _eos_ids_in(path: Path, vocab_size: int) -> list[int]:
    given = read_json_object(path).get(EOS) if path.exists() else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise UserError(
                f"{path}: field {EOS!r} must be a token id or a list of token ids, each >= 0 and < vocab_size "
                f"({vocab_size}), found {shown(i)}"
            )
    return ids
