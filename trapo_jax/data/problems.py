"""Examples to problems (tokens), and problems to batches."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import grain
import numpy as np

from trapo_jax.data.examples import DataReport, Example
from trapo_jax.data.templates import Template
from trapo_jax.types import Expert, Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_TEXT = Template()  # the text as it stands
EXTRA_PROBLEMS_STREAM = 1  # a stream of random numbers of its own, beside the order of the batches
EXPERTS_TOO_LONG = "experts left out: over"  # the start of a note of a report
_CHUNK_SIZE = 256  # at once; the tokenizer runs them on all cores


def encode_examples(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    template: Template = PLAIN_TEXT,
    max_prompt_length: int,
    overlong_prompts: Literal["drop", "truncate", "error"] = "drop",
    max_expert_length: int | None = None,
    name: str = "data",
) -> tuple[list[Problem], DataReport]:
    """Renders and tokenises examples; each expert solution gets EOS.

    Examples with the same prompt and answer become one problem with the experts of all. BOS comes first where
    the tokenizer puts it and the text does not have it. A tokenizer's own chat template decides this itself, as in
    `apply_chat_template`.

    Args:
      examples: raw examples.
      tokenizer: the policy's, with an EOS token.
      template: from `make_template`; the text as it stands unless given.
      max_prompt_length: longest prompt, in tokens, template included.
      overlong_prompts: "drop" the example, "truncate" to the last tokens (BOS is kept), or "error".
      max_expert_length: longest expert solution in tokens, EOS included; a longer one is dropped, its problem
        stays. None for no limit.
      name: the option that selects the examples, for errors.

    Returns:
      The problems in the order of the examples, and the counts.

    Raises:
      UserError: for a prompt that is too long under "error" or that the template refuses; with the
        counts, if no problem is left.
    """
    encoder = _Encoder(tokenizer)
    merged, num_read = _merge_duplicates(examples)
    dropped, notes = Counter[str](), Counter[str]()
    if num_read > len(merged):
        dropped["joined to an equal problem"] = num_read - len(merged)
    problems: list[Problem] = []
    longest = 0
    rendered = template.render_all([example.prompt for example in merged])
    for start in range(0, len(merged), _CHUNK_SIZE):
        chunk = merged[start : start + _CHUNK_SIZE]
        texts = rendered[start : start + _CHUNK_SIZE]
        prompts = encoder.encode(texts)
        if not template.is_chat:
            prompts = [encoder.with_bos(ids) for ids in prompts]
        solutions = iter(encoder.encode([s for example in chunk for s in example.solutions]))
        for example, text, prompt_ids in zip(chunk, texts, prompts, strict=True):
            solution_ids = [next(solutions) for _ in example.solutions]
            longest = max(longest, len(prompt_ids))
            if len(prompt_ids) > max_prompt_length:
                if overlong_prompts == "error":
                    raise _overlong_prompt(text, len(prompt_ids), max_prompt_length)
                if overlong_prompts == "drop":
                    dropped[f"with a prompt over {max_prompt_length} tokens"] += 1
                    continue
                notes[f"prompts cut to {max_prompt_length} tokens"] += 1
                prompt_ids = encoder.last_tokens(prompt_ids, max_prompt_length)
                text = encoder.decode(prompt_ids)
            if not prompt_ids:
                dropped["with a prompt without tokens"] += 1
                continue
            experts = [encoder.encode_expert(ids, max_expert_length, notes) for ids in solution_ids]
            problems.append(
                Problem(
                    id=_content_id(example),
                    prompt_ids=prompt_ids,
                    answer=example.answer,
                    experts=tuple(expert for expert in experts if expert is not None),
                    prompt_text=text,
                    source=example.source,
                    columns=example.columns,
                )
            )
    if num_without := sum(not problem.experts for problem in problems):
        notes["problems without an expert"] = num_without
    report = DataReport(num_read, len(problems), dict(dropped), dict(notes))
    if not problems:
        raise _nothing_usable(name, report, longest, max_prompt_length)
    return problems, report


def hold_out(
    examples: Sequence[Example], size: int, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Takes `size` examples out at random: the rest and what was taken, each in its order.

    Examples with the same prompt stay together, so that the parts are disjoint by prompt.

    Raises:
      UserError: if nothing would be left.
    """
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) <= size:
        raise UserError(
            f"data: {size} problems cannot be held out of {len(prompts)}; give data.validation_files and "
            "data.test_files, or lower data.num_validation and data.num_test (0 for none)"
        )
    taken = set(random.Random(seed).sample(range(len(prompts)), size))
    held_out = {prompt for i, prompt in enumerate(prompts) if i in taken}
    return (
        [example for example in examples if example.prompt not in held_out],
        [example for example in examples if example.prompt in held_out],
    )


def problem_batches(problems: Sequence[Problem], *, batch_size: int, seed: int) -> Any:
    """An endless, randomly accessible sequence: `batches[step]` is the list of step's problems.

    Every epoch is a new permutation; what its last batch would leave incomplete is left out, so
    that no batch holds a problem twice. Because a step number determines its batch, the position
    in the data is the step, and resuming needs no iterator state.

    Raises:
      UserError: if there are fewer problems than a batch holds.
    """
    if len(problems) < batch_size:
        raise UserError(
            f"train.problems_per_step={batch_size}: more than the {len(problems)} training problems, so that a batch would "
            "repeat problems; lower it"
        )
    dataset = grain.MapDataset.source(list(problems)).seed(seed).shuffle()
    return dataset.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()


def draw_problems(
    problems: Sequence[Problem], *, count: int, seed: int, step: int
) -> list[Problem]:
    """`count` problems with experts for a step, beside its batch: endless permutations, cut into pieces.

    A step number determines its problems. One comes twice only when all have come as often.

    Raises:
      UserError: if no problem has an expert, but some are asked for.
    """
    with_expert = [problem for problem in problems if problem.experts] if count else []
    if count and not with_expert:
        raise UserError("method.name: it learns from experts, but no training problem has one")
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
    """SHA-256 over everything of the problems that training sees, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        experts = [expert.token_ids for expert in problem.experts]
        seen = [problem.prompt_ids, problem.answer, experts, problem.source, dict(problem.columns)]
        digest.update(json.dumps(seen, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class _Encoder:
    """A tokenizer, and what is looked up in its vocabulary once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        num_ids = max(tokenizer.get_vocab().values()) + 1
        # One int object for each id: a data set of 4e8 tokens is 3 GB of references, not 13 GB of ints.
        self._ids = list(range(num_ids))
        texts = tokenizer.batch_decode([[i] for i in range(num_ids)])
        self._blank_line = {i for i, text in enumerate(texts) if "\n\n" in text}
        self._newline_first = {i for i, text in enumerate(texts) if text.startswith("\n")}
        self._newline_last = {i for i, text in enumerate(texts) if text.endswith("\n")}
        assert isinstance(tokenizer.eos_token_id, int)
        self._eos_id = tokenizer.eos_token_id
        bos_id = tokenizer.bos_token_id
        self._bos_id = bos_id if isinstance(bos_id, int) else None
        self._adds_bos = self._bos_id is not None and self._bos_id in tokenizer.encode("")

    def encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [tuple(map(self._ids.__getitem__, ids)) for ids in encoded["input_ids"]]

    def decode(self, ids: tuple[int, ...]) -> str:
        text = self._tokenizer.decode(list(ids))
        assert isinstance(text, str)
        return text

    def with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._bos_id is not None and self._adds_bos and ids[:1] != (self._bos_id,):
            return (self._bos_id, *ids)
        return ids

    def last_tokens(self, ids: tuple[int, ...], length: int) -> tuple[int, ...]:
        """The end of a prompt, where the assistant begins, after its BOS if it has one."""
        num_kept_first = int(ids[0] == self._bos_id)
        return ids[:num_kept_first] + ids[len(ids) - length + num_kept_first :]

    def encode_expert(
        self, ids: tuple[int, ...], max_length: int | None, notes: Counter[str]
    ) -> Expert | None:
        """The expert solution, or None if it is left out; notes what was done."""
        while ids and ids[-1] == self._eos_id:  # spelled out in the data
            ids = ids[:-1]
        if not ids or self._eos_id in ids:
            notes["experts left out: nothing, or EOS inside"] += 1
            return None
        ids = (*ids, self._eos_id)
        if max_length is not None and len(ids) > max_length:
            notes[f"{EXPERTS_TOO_LONG} {max_length} tokens"] += 1
            return None
        return Expert(ids, self._paragraph_ends(ids))

    def _paragraph_ends(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Where a token contains a blank line, or completes one: some vocabularies have no such token."""
        return tuple(
            i + 1
            for i, token in enumerate(ids)
            if token in self._blank_line
            or (token in self._newline_first and i > 0 and ids[i - 1] in self._newline_last)
        )


def _merge_duplicates(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Examples of distinct ids, each with the experts of all that share its id; how many were read."""
    merged: dict[str, Example] = {}
    num_read = 0
    for example in examples:
        num_read += 1
        first = merged.setdefault(_content_id(example), example)
        if first is not example:
            solutions = tuple(dict.fromkeys(first.solutions + example.solutions))
            merged[_content_id(example)] = first._replace(solutions=solutions)
    return list(merged.values()), num_read


def _nothing_usable(name: str, report: DataReport, longest: int, limit: int) -> UserError:
    hint = ""
    if longest > limit:
        hint = f"; raise data.max_prompt_length, since the longest prompt has {longest} tokens"
    return UserError(f"{name}: no problem is usable: {report}{hint}")


def _overlong_prompt(text: str, length: int, limit: int) -> UserError:
    shown = repr(text) if len(text) <= 60 else repr(text[:60]) + "..."
    return UserError(
        f"data.max_prompt_length={limit}: the prompt {shown} has {length} tokens; "
        "raise data.max_prompt_length"
    )


def _content_id(example: Example) -> str:
    """From prompt and answer; text and the single user message of the same text are one prompt."""
    prompt = example.prompt
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    content = json.dumps([prompt, example.answer], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
