"""The tokenizer of a Hugging Face folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trapo_jax.files import read_json_object
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Loads `tokenizer.json` from a local folder.

    It never downloads files and never runs code from the folder. (`AutoTokenizer` would look for custom code in the
    folder and ask on the terminal whether to run it.)

    Raises:
      UserError: if the folder has no readable tokenizer, or the tokenizer has no EOS token. The error names the
        folder.
    """
    # Only the tokenizers of transformers are used, so suppress its advice to install torch for its models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes seconds to import

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: cannot load the tokenizer (no tokenizer.json)")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: cannot load the tokenizer ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}/tokenizer_config.json: no eos_token; completions would never end"
        )
    return tokenizer


def check_token_ids(folder: Path, tokenizer: "PreTrainedTokenizerFast", *, vocab_size: int) -> None:
    """Checks that every token has a row in the embedding, and the id that `tokenizer.json` gives it.

    Args:
      folder: the folder of the tokenizer.
      tokenizer: the tokenizer that was loaded from it.
      vocab_size: number of rows of the embedding.

    Raises:
      UserError: if an id is too large, or the tokenizer assigned an id that differs from that in the file.
    """
    path = folder / "tokenizer.json"
    vocabulary = tokenizer.get_vocab()
    added_tokens = read_json_object(path).get("added_tokens") or ()
    added = {token["content"]: token["id"] for token in added_tokens}
    template_ids = tokenizer("").input_ids  # the ids that the tokenizer adds to every text
    largest = max([*vocabulary.values(), *added.values(), *template_ids])
    if largest >= vocab_size:
        raise UserError(
            f"{path}: the largest token id is {largest}, but vocab_size in config.json is {vocab_size}; the model has "
            "no embedding for such a token"
        )
    for content, token_id in added.items():
        if (assigned := vocabulary.get(content, token_id)) != token_id:
            raise UserError(
                f"{path}: the added token {content!r} has the id {token_id}, but the tokenizers library assigns "
                f"{assigned}"
            )
