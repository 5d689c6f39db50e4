"""Generates grade-school word problems with reasoning-gym's `gsm_symbolic` (extra `tasks`).

The user text is the question and, on its own line, the `qwen_math` template's instruction: reason step by step, final
answer in `\\boxed{}`. The expert is reasoning-gym's worked solution with its last line, `#### 42`, rewritten as
`The final answer is \\boxed{42}.`, the form that the prompt asks for.
"""

import random
import warnings
from collections.abc import Iterator
from typing import Any

from trapo_jax.data.examples import Example
from trapo_jax.data.templates import MATH_INSTRUCTION
from trapo_jax.types import UserError

SOURCE = "gsm_symbolic"
ANSWER_MARKER = "####"
BLOCK_SIZE = 1000


def gsm_symbolic_splits(
    *, seed: int, num_train: int, num_validation: int, num_test: int
) -> dict[str, list[Example]]:
    """Returns train, validation and test examples with disjoint prompts.

    All splits share reasoning-gym's few dozen stories; names, objects and numbers differ.

    Args:
      seed: determines everything for a given version of reasoning-gym.
      num_train, num_validation, num_test: sizes of the splits.

    Raises:
      UserError: if reasoning-gym is not installed.
    """
    sizes = {"validation": num_validation, "test": num_test, "train": num_train}
    stream = _distinct_examples(seed)
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def gsm_symbolic_example(item: dict[str, Any]) -> Example | None:
    """Returns the example for a reasoning-gym item; None if its worked solution does not reach its answer."""
    answer = item["answer"]
    steps, marker, result = item["metadata"]["answer_cot"].rpartition(ANSWER_MARKER)
    if not marker or float(result.replace(",", "")) != float(answer):
        return None
    prompt = f"{item['question']}\n{MATH_INSTRUCTION}"
    solution = f"{steps.rstrip()}\nThe final answer is \\boxed{{{answer}}}."
    return Example(prompt, answer, (solution,), SOURCE)


def _distinct_examples(seed: int) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():  # raised by its imports the first time
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym  # takes seconds to import
    except ImportError as error:
        raise UserError(
            "data.source=gsm_symbolic: reasoning-gym is not installed; pip install 'trapo-jax[tasks]'"
        ) from error
    # Item i is drawn from seed + i, so adjacent seeds would share almost all problems.
    seeds = random.Random(seed)
    seen: set[str] = set()
    while True:
        # A dataset holds a list of its own length, so several of moderate size are created.
        block = reasoning_gym.create_dataset(SOURCE, seed=seeds.getrandbits(48), size=BLOCK_SIZE)
        for index in range(BLOCK_SIZE):
            example = gsm_symbolic_example(block[index])
            if example is None or example.prompt in seen:
                continue
            assert isinstance(example.prompt, str)
            seen.add(example.prompt)
            yield example
