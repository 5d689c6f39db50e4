"""Loads the tokenizer of a Hugging Face folder."""

import base64
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_jax.inputs.files import MAX_BYTES, check_regular, read_json_object, reason_of
from trapo_jax.models.side_files import SIDE_FILES
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_TOKENIZER_BYTES = 64 * 2**20  # Gemma 3's tokenizer.json has 33 million bytes.
MAX_TEMPLATE_BYTES = 2**20
MAX_GROWTH = 100  # Unicode normalization expands a character to at most 18 characters.
MAX_NESTING = 10


def load_tokenizer(folder: Path, *, vocab_size: int | None = None) -> "PreTrainedTokenizerFast":
    """Loads `tokenizer.json` from a local folder.

    This function never downloads files or runs code from the folder. (`AutoTokenizer` would look for custom code in the
    folder and ask on the terminal whether to run it.)

    Args:
      folder: the folder.
      vocab_size: number of rows in the embedding, if known. All token ids must be smaller.

    Raises:
      UserError: if the folder has no readable tokenizer, or if the tokenizer has no EOS token, may make text many times
        longer, has a token id that is too large, or assigns a token an id that differs from the one in the file. The
        error names the file.
    """
    # Only the tokenizers of transformers are used, so suppress its advice to install PyTorch, which its models need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes seconds to import

    path = folder / TOKENIZER
    if not path.exists():
        raise UserError(f"{folder}: cannot load the tokenizer (no {TOKENIZER})")
    _check_files(folder)
    content = read_json_object(path, max_bytes=MAX_TOKENIZER_BYTES)
    _check_growth(path, content)
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
        template_ids = tokenizer("").input_ids  # the ids that the tokenizer adds to every string
    except Exception as error:  # The Rust library raises a plain Exception for a damaged file.
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(
            f"{folder}: cannot load the tokenizer ({reason}); {TOKENIZER} or {TOKENIZER_CONFIG} is invalid"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder / TOKENIZER_CONFIG}: no eos_token; completions would never end")
    templates = tokenizer.chat_template or {}
    texts = [*templates, *templates.values()] if isinstance(templates, dict) else [templates]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: chat_template must be a string or map names to strings"
        )
    if vocab_size is not None:
        _check_ids(path, content, tokenizer.get_vocab(), template_ids, vocab_size=vocab_size)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Checks that all tokenizer files read by transformers are regular files of a plausible size."""
    for path in (path for pattern in SIDE_FILES for path in folder.glob(pattern)):
        check_regular(path)
        max_bytes = MAX_TEMPLATE_BYTES if path.suffix == ".jinja" else MAX_BYTES
        if path.name == TOKENIZER:
            max_bytes = MAX_TOKENIZER_BYTES
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path}: larger than {max_bytes:,} bytes, the limit for such a file")
    config = folder / TOKENIZER_CONFIG
    if config.exists() and "fast_tokenizer_files" in read_json_object(config):
        raise UserError(f"{config}: fast_tokenizer_files is not supported; only {TOKENIZER} is")


def _check_growth(path: Path, content: Mapping[str, Any]) -> None:
    """Checks that neither encoding nor decoding can make text many times longer, which could exhaust memory."""
    for name in ("normalizer", "decoder"):
        try:
            growth = _growth(content.get(name), MAX_NESTING)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: {name} is not valid ({reason_of(error)})") from error
        if growth > MAX_GROWTH:
            raise UserError(
                f"{path}: {name} may make text more than {MAX_GROWTH} times longer, which is not supported"
            )


def _growth(part: Any, max_nesting: int) -> float:
    """Returns an upper bound on a normalizer's or decoder's number of output characters per input character."""
    if part is None:
        return 1.0
    match part.get("type"):
        case "Sequence" if max_nesting:
            parts = part.get("normalizers") or part.get("decoders") or ()
            return math.prod(_growth(p, max_nesting - 1) for p in parts)
        case "Sequence":
            return math.inf
        case "Replace":
            length = len(part["pattern"].get("String") or " ")
            return max(1.0, len(part["content"]) / length)
        case "Prepend":
            return 1.0 + len(part["prepend"])
        case "Precompiled":
            # The data consists of the size of a trie in bytes, the trie, and the NUL-terminated strings to which the
            # trie maps characters.
            data = base64.b64decode(part["precompiled_charsmap"])
            texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
            return max(1.0, *map(len, texts))
    return 1.0


def _check_ids(
    path: Path,
    content: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    template_ids: list[int],
    *,
    vocab_size: int,
) -> None:
    """Checks that every token has a row in the embedding and the id assigned by `tokenizer.json`."""
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    largest = max([*vocabulary.values(), *added.values(), *template_ids])
    if largest >= vocab_size:
        raise UserError(
            f"{path}: the largest token id is {largest}, but vocab_size in config.json is {vocab_size}; the model has "
            "no embedding for this token"
        )
    for token, token_id in added.items():
        if (assigned := vocabulary.get(token, token_id)) != token_id:
            raise UserError(
                f"{path}: the added token {token!r} has the id {token_id}, but the tokenizers library assigns "
                f"{assigned} to it"
            )
