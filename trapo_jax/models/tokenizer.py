"""The tokenizer of a Hugging Face folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Loads `tokenizer.json` of a local folder; never fetches, never runs the folder's code.

    Not `AutoTokenizer`, which looks for code that the folder names and asks on the terminal whether to run it.

    Raises:
      UserError: naming the folder, if there is none that can be read, or it has no EOS token.
    """
    # Its tokenizers are all that is used here: no advice to install torch for its models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # seconds to import

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer that can be loaded (no tokenizer.json)")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: no tokenizer that can be loaded ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}/tokenizer_config.json: no eos_token; completions could not end")
    return tokenizer
