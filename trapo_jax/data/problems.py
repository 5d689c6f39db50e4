"""Examples to problems (tokens), and problems to batches."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grain

from trapo_jax.data.card_shuffles import Example
from trapo_jax.types import Expert, Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_problems(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_prompt_length: int,
) -> list[Problem]:
    """Tokenises examples; the prompt is the text as it stands, each expert solution gets EOS.

    Raises:
      UserError: for a prompt longer than `max_prompt_length` tokens.
    """
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)
    problems = []
    for example in examples:
        prompt_ids = tuple(tokenizer.encode(example.prompt, add_special_tokens=False))
        if len(prompt_ids) > max_prompt_length:
            raise UserError(
                f"data.max_prompt_length={max_prompt_length}: the prompt {example.prompt!r} has "
                f"{len(prompt_ids)} tokens; raise data.max_prompt_length"
            )
        experts = []
        for solution in example.solutions:
            ids = tuple(tokenizer.encode(solution, add_special_tokens=False))
            ends = [i + 1 for i, token in enumerate(ids) if "\n\n" in tokenizer.decode([token])]
            experts.append(Expert((*ids, eos_id), tuple(ends)))
        problems.append(
            Problem(
                id=_content_id(example),
                prompt_ids=prompt_ids,
                answer=example.answer,
                experts=tuple(experts),
                prompt_text=example.prompt,
                source=example.source,
            )
        )
    return problems


def problem_batches(problems: Sequence[Problem], *, batch_size: int, seed: int) -> Any:
    """An endless, randomly accessible sequence: `batches[step]` is the list of step's problems.

    Every epoch is a new permutation; what its last batch would leave incomplete is left out, so
    that no batch holds a problem twice. Because a step number determines its batch, the position
    in the data is the step, and resuming needs no iterator state.
    """
    dataset = grain.MapDataset.source(list(problems)).seed(seed).shuffle()
    return dataset.batch(batch_size, drop_remainder=True, batch_fn=list).repeat()


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 over everything of the problems that training sees, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        experts = [expert.token_ids for expert in problem.experts]
        digest.update(json.dumps([problem.prompt_ids, problem.answer, experts]).encode())
    return digest.hexdigest()


def _content_id(example: Example) -> str:
    content = json.dumps([example.prompt, example.answer], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
