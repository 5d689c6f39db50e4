"""Encodes examples as problems (token ids), and batches problems."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trapo_jax.data.encoding import Encoder, as_encoder
from trapo_jax.data.examples import DataReport, Example
from trapo_jax.data.templates import Template
from trapo_jax.inputs.files import shown
from trapo_jax.types import Expert, Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_TEXT = Template()  # leaves the text unchanged
EXTRA_PROBLEMS_STREAM = 1  # a random number stream independent of the batch order
# The first words of some reasons and notes in a report.
PROMPT_TOO_LONG, PROMPTS_CUT = "with a prompt longer than", "prompts truncated to"
EXPERTS_TOO_LONG = "expert solutions dropped: longer than"
MAX_TOKEN_CHARS = 64  # Text usually has 3 to 5 characters per token.
_CHUNK_SIZE = 256  # number of examples to encode at once; the tokenizer uses all cores


def encode_examples(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast | Encoder",
    *,
    template: Template = PLAIN_TEXT,
    max_prompt_length: int,
    overlong_prompts: Literal["drop", "truncate", "error"] = "drop",
    max_expert_length: int | None = None,
    name: str = "data",
) -> tuple[list[Problem], DataReport]:
    """Renders and tokenizes examples, and appends EOS to each expert solution.

    Examples with the same prompt and answer become one problem with all of their expert solutions. BOS is prepended if
    the tokenizer adds BOS to every string and the prompt does not already start with BOS. With a tokenizer's own chat
    template, only the template decides whether to add BOS, as in `apply_chat_template`. Text with more than
    `MAX_TOKEN_CHARS` characters per allowed token counts as too long without being encoded.

    Args:
      examples: raw examples.
      tokenizer: the policy's tokenizer, with an EOS token, or an `Encoder` that several datasets share.
      template: a template from `make_template`; by default, text is left unchanged.
      max_prompt_length: maximum prompt length in tokens, including the template.
      overlong_prompts: "drop" drops the example, "truncate" keeps the last tokens (and BOS), and "error" raises an
        error.
      max_expert_length: maximum length of an expert solution in tokens, including EOS; longer solutions are dropped,
        but their problems are kept. None for no limit.
      name: the option that selects the examples, for error messages.

    Returns:
      The problems in the order of the examples, and a report.

    Raises:
      UserError: if a prompt is too long and `overlong_prompts` is "error", if the template rejects a prompt, if the
        tokenizer fails, or if no problem is left. In the last case, the message contains the counts.
    """
    merged, num_read = _merge_duplicates(examples)
    dropped, notes = Counter[str](), Counter[str]()
    if num_read > len(merged):
        dropped["merged into an identical problem"] = num_read - len(merged)
    problems: list[Problem] = []
    # Length of the longest encoded prompt, in tokens, and of the longest prompt too long to encode, in characters.
    longest = num_chars = 0
    rendered = template.render_all([example.prompt for example in merged])
    with as_encoder(tokenizer) as encoder:
        for start in range(0, len(merged), _CHUNK_SIZE):
            chunk = merged[start : start + _CHUNK_SIZE]
            texts = rendered[start : start + _CHUNK_SIZE]
            prompts = _encode_prompts(texts, encoder, template, max_prompt_length)
            solutions = _encode_solutions(chunk, encoder, max_expert_length)
            for example, text, ids, of_example in zip(
                chunk, texts, prompts, solutions, strict=True
            ):
                longest = max(longest, len(ids or ()))
                if ids is None or len(ids) > max_prompt_length:
                    num_chars = max(num_chars, len(text) if ids is None else 0)
                    if overlong_prompts == "error":
                        raise _overlong_prompt(text, ids, max_prompt_length)
                    if overlong_prompts == "drop":
                        dropped[f"{PROMPT_TOO_LONG} {max_prompt_length} tokens"] += 1
                        continue
                    notes[f"{PROMPTS_CUT} {max_prompt_length} tokens"] += 1
                    ids = _encode_end(text, encoder, template, max_prompt_length)
                    text = encoder.decode(ids)
                if not ids:
                    dropped["with a prompt that has no tokens"] += 1
                    continue
                experts = [_make_expert(i, encoder, max_expert_length, notes) for i in of_example]
                problems.append(
                    Problem(
                        id=_content_id(example),
                        prompt_ids=ids,
                        answer=example.answer,
                        experts=tuple(expert for expert in experts if expert is not None),
                        prompt_text=text,
                        source=example.source,
                        columns=example.columns,
                    )
                )
    if num_without := sum(not problem.experts for problem in problems):
        notes["problems without an expert"] = num_without
    length = f"{num_chars:,} characters" if num_chars else f"{longest:,} tokens"
    report = DataReport(
        num_read,
        len(problems),
        dict(dropped),
        dict(notes),
        prompt_limit=max_prompt_length,
        longest_prompt=length,
    )
    if not problems:
        hint = ""
        if num_chars or longest > max_prompt_length:
            hint = f"; raise data.max_prompt_length, since the longest prompt has {length}"
        raise UserError(f"{name}: no problem is usable: {report}{hint}")
    return problems, report


def hold_out(
    examples: Sequence[Example], size: int, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Holds out the examples of `size` random prompts; returns the rest and the held-out ones, each in order.

    Examples with the same prompt stay together, so that the two parts share no prompts.

    Raises:
      UserError: if nothing would be left.
    """
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) <= size:
        raise UserError(
            f"data: {size} problems cannot be held out of {len(prompts)}; set data.validation_files and "
            "data.test_files, or lower data.num_validation and data.num_test (0 for none)"
        )
    taken = set(random.Random(seed).sample(range(len(prompts)), size))
    held_out = {prompt for i, prompt in enumerate(prompts) if i in taken}
    return (
        [example for example in examples if example.prompt not in held_out],
        [example for example in examples if example.prompt in held_out],
    )


def problem_batches(problems: Sequence[Problem], *, batch_size: int, seed: int) -> Any:
    """Returns an endless, randomly accessible sequence: `batches[step]` is the list of the step's problems.

    Every epoch is a new permutation, and an incomplete last batch is dropped, so that no batch contains a problem
    twice. The step number determines the batch, so resuming needs no iterator state.

    Raises:
      UserError: if there are fewer problems than `batch_size`.
    """
    import grain  # takes half a second, which commands that do not train should not spend

    if len(problems) < batch_size:
        raise UserError(
            f"train.problems_per_step={batch_size}: more than the {len(problems)} training problems, so a batch would "
            "repeat problems; lower it"
        )
    dataset = grain.MapDataset.source(list(problems)).seed(seed).shuffle()
    return dataset.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()


def draw_problems(
    problems: Sequence[Problem], *, count: int, seed: int, step: int
) -> list[Problem]:
    """Draws `count` problems with expert solutions for a step, in addition to the problems of its batch.

    The seed and the step number determine the problems. A problem is drawn again only after all others have been drawn
    as often.

    Raises:
      UserError: if `count` is positive, but no problem has an expert solution.
    """
    with_expert = [problem for problem in problems if problem.experts] if count else []
    if count and not with_expert:
        raise UserError(
            "method.name: the method learns from expert solutions, but no training problem has one"
        )
    orders: dict[int, np.ndarray] = {}
    drawn = []
    for position in range((step - 1) * count, step * count):
        epoch, index = divmod(position, len(with_expert))
        if epoch not in orders:
            random = np.random.default_rng([seed, EXTRA_PROBLEMS_STREAM, epoch])
            orders[epoch] = random.permutation(len(with_expert))
        drawn.append(with_expert[orders[epoch][index]])
    return drawn


def fingerprint(problems: Sequence[Problem]) -> str:
    """Returns the SHA-256 hash of everything that training uses from the problems, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        experts = [expert.token_ids for expert in problem.experts]
        seen = [problem.prompt_ids, problem.answer, experts, problem.source, dict(problem.columns)]
        digest.update(json.dumps(seen, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _encode_prompts(
    texts: Sequence[str], encoder: Encoder, template: Template, max_length: int
) -> list[tuple[int, ...] | None]:
    """Returns the token ids of prompts; None for a prompt with too many characters for `max_length` tokens."""
    is_short = [len(text) <= MAX_TOKEN_CHARS * max_length for text in texts]
    encoded = iter(encoder.encode(list(compress(texts, is_short))))
    prompts = [next(encoded) if short else None for short in is_short]
    if template.is_chat:
        return prompts
    return [None if ids is None else encoder.with_bos(ids) for ids in prompts]


def _encode_end(
    text: str, encoder: Encoder, template: Template, max_length: int
) -> tuple[int, ...]:
    """Returns the last tokens of a prompt that is too long."""
    end = encoder.end_of(text, MAX_TOKEN_CHARS * max_length)
    ids = encoder.encode([end])[0]
    if not template.is_chat:
        ids = encoder.with_bos(ids)
    return encoder.last_tokens(ids, max_length) if len(ids) > max_length else ids


def _encode_solutions(
    examples: Sequence[Example], encoder: Encoder, max_length: int | None
) -> list[list[tuple[int, ...] | None]]:
    """Returns the token ids of each example's solutions; None for a solution with too many characters."""
    max_chars = math.inf if max_length is None else MAX_TOKEN_CHARS * max_length
    short = [text for example in examples for text in example.solutions if len(text) <= max_chars]
    encoded = iter(encoder.encode(short))
    return [
        [next(encoded) if len(text) <= max_chars else None for text in example.solutions]
        for example in examples
    ]


def _make_expert(
    ids: tuple[int, ...] | None, encoder: Encoder, max_length: int | None, notes: Counter[str]
) -> Expert | None:
    """Returns an expert solution; None if the solution is dropped, in which case the reason is counted in `notes`."""
    if ids is not None:
        while ids and ids[-1] == encoder.eos_id:  # EOS written out in the data
            ids = ids[:-1]
        if not ids or encoder.eos_id in ids:
            notes["expert solutions dropped: empty, or with EOS inside"] += 1
            return None
        ids = (*ids, encoder.eos_id)
    if ids is None or (max_length is not None and len(ids) > max_length):
        notes[f"{EXPERTS_TOO_LONG} {max_length} tokens"] += 1
        return None
    return Expert(ids, encoder.paragraph_ends(ids))


def _merge_duplicates(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Merges examples with the same id, and returns the merged examples and the number of examples read."""
    merged: dict[str, Example] = {}
    num_read = 0
    for example in examples:
        num_read += 1
        first = merged.setdefault(_content_id(example), example)
        if first is not example:
            solutions = tuple(dict.fromkeys(first.solutions + example.solutions))
            merged[_content_id(example)] = first._replace(solutions=solutions)
    return list(merged.values()), num_read


def _overlong_prompt(text: str, ids: tuple[int, ...] | None, limit: int) -> UserError:
    length = f"{len(text):,} characters" if ids is None else f"{len(ids)} tokens"
    return UserError(
        f"data.max_prompt_length={limit}: the prompt {shown(text)} has {length}; raise data.max_prompt_length"
    )


def _content_id(example: Example) -> str:
    """Returns an id for a prompt and its answer. Plain text and a single user message with this text get equal ids."""
    prompt = example.prompt
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    content = json.dumps([prompt, example.answer], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
