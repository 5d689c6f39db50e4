"""Encodes strings as token ids in a separate process with limits on time and memory."""

import array
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trapo_jax.sandbox import child_environment
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENCODE_WORKER = (sys.executable, "-P", str(Path(__file__).with_name("encode_worker.py")))
ENCODE_SECS = 30.0  # CPU time limit for one request, which normally takes tenths of a second.
ENCODE_MEMORY_BYTES = 5 * 2**28
MAX_TEXTS, MAX_CHARS = 256, 300_000  # Limits for one request, unless a single string is longer.

Ids = tuple[int, ...]


@contextlib.contextmanager
def as_encoder(tokenizer: "PreTrainedTokenizerFast | Encoder") -> Iterator["Encoder"]:
    """Yields an encoder unchanged; for a tokenizer, yields a new encoder, whose process ends when the context exits."""
    if isinstance(tokenizer, Encoder):
        yield tokenizer
        return
    with Encoder(tokenizer) as encoder:
        yield encoder


class Encoder:
    """A tokenizer that encodes strings in a separate process, which ends when this object's context exits.

    Args:
      tokenizer: the policy's tokenizer, with an EOS token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self.tokenizer = tokenizer
        num_ids = max(tokenizer.get_vocab().values()) + 1
        # One int object per id, shared by all tokens: 4e8 tokens take 3 GB of references instead of 13 GB of ints.
        self._ids = list(range(num_ids))
        texts = tokenizer.batch_decode([[i] for i in range(num_ids)])
        self._blank_line = {i for i, text in enumerate(texts) if "\n\n" in text}
        self._newline_first = {i for i, text in enumerate(texts) if text.startswith("\n")}
        self._newline_last = {i for i, text in enumerate(texts) if text.endswith("\n")}
        assert isinstance(tokenizer.eos_token_id, int)
        self.eos_id = tokenizer.eos_token_id
        bos_id = tokenizer.bos_token_id
        self._bos_id = bos_id if isinstance(bos_id, int) else None
        self._adds_bos = self._bos_id is not None and self._bos_id in tokenizer.encode("")
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the token ids of strings, without the special tokens that the tokenizer adds to every string.

        Raises:
          UserError: if the tokenizer fails, or takes too much time or memory.
        """
        encoded: list[Ids] = []
        while len(encoded) < len(texts):
            num, num_chars = 0, 0
            for text in texts[len(encoded) : len(encoded) + MAX_TEXTS]:
                num_chars += len(text)
                if num and num_chars > MAX_CHARS:
                    break
                num += 1
            encoded += self._request(texts[len(encoded) : len(encoded) + num])
        return encoded

    def _request(self, texts: Sequence[str]) -> list[Ids]:
        worker = self._worker = self._worker or self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(texts).encode() + b"\n")
            worker.stdin.flush()
            reply = json.loads(worker.stdout.readline())
        except (OSError, ValueError) as error:  # The worker has ended.
            raise self._error(_describe_exit(worker.wait())) from error
        if isinstance(reply, str):
            raise self._error(f"fails ({reply})")
        ids = array.array("I", worker.stdout.read(4 * sum(reply)))
        numbers = map(self._ids.__getitem__, ids)
        return [tuple(islice(numbers, length)) for length in reply]

    def _start(self) -> "subprocess.Popen[bytes]":
        setting = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "encode_special_tokens": self.tokenizer.split_special_tokens,
        }
        worker = subprocess.Popen(
            [*ENCODE_WORKER, str(ENCODE_SECS), str(ENCODE_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(setting).encode() + b"\n")
        return worker

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.tokenizer.name_or_path}: the tokenizer {what}")

    def decode(self, ids: Ids) -> str:
        text = self.tokenizer.decode(list(ids))
        assert isinstance(text, str)
        return text

    def with_bos(self, ids: Ids) -> Ids:
        """Returns a prompt with BOS prepended, if the tokenizer adds BOS to every string."""
        if self._bos_id is not None and self._adds_bos and ids[:1] != (self._bos_id,):
            return (self._bos_id, *ids)
        return ids

    def end_of(self, text: str, num_chars: int) -> str:
        """Returns the last characters of a string, preceded by BOS if the string starts with BOS."""
        bos = self.tokenizer.bos_token
        return (bos if isinstance(bos, str) and text.startswith(bos) else "") + text[-num_chars:]

    def last_tokens(self, ids: Ids, length: int) -> Ids:
        """Returns `length` tokens from the end of a prompt. If the prompt starts with BOS, the result does too."""
        num_kept_first = int(ids[0] == self._bos_id)
        return ids[:num_kept_first] + ids[len(ids) - length + num_kept_first :]

    def paragraph_ends(self, ids: Ids) -> Ids:
        """Returns the positions after tokens that contain a blank line, or complete one begun by the previous token."""
        return tuple(
            i + 1
            for i, token in enumerate(ids)
            if token in self._blank_line
            or (token in self._newline_first and i > 0 and ids[i - 1] in self._newline_last)
        )


def _describe_exit(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {ENCODE_SECS:g} s for a few strings"
    if code == -signal.SIGABRT:
        return f"takes more than {ENCODE_MEMORY_BYTES / 2**30:g} GiB of memory for a few strings"
    return f"cannot be run (exit code {code})"
