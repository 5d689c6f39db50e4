"""The tokenizer of a Hugging Face folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

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


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Returns the tokenizer's special tokens as text, including those that the folder adds."""
    added = tokenizer.added_tokens_decoder.values()
    return list(
        dict.fromkeys([*tokenizer.all_special_tokens, *(t.content for t in added if t.special)])
    )
