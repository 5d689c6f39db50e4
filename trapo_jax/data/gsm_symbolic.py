"""Generates grade-school word problems with reasoning-gym's `gsm_symbolic` (requires the extra `tasks`).

The prompt is the question followed, on its own line, by the instruction of the `qwen_math` template, which asks for
step-by-step reasoning and a final answer in `\\boxed{}`. The expert solution is reasoning-gym's worked solution, whose
last line, `#### 42`, is replaced by `The final answer is \\boxed{42}.`, the form that the prompt asks for.
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

    All splits draw on the same few dozen reasoning-gym stories, but with different names, objects and numbers.

    Args:
      seed: random seed, which determines all examples for a given version of reasoning-gym.
      num_train, num_validation, num_test: sizes of the splits.

    Raises:
      UserError: if reasoning-gym is not installed.
    """
    sizes = {"validation": num_validation, "test": num_test, "train": num_train}
    stream = _distinct_examples(seed)
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def gsm_symbolic_example(item: dict[str, Any]) -> Example | None:
    """Returns the example for a reasoning-gym item; None if the worked solution does not reach the answer."""
    answer = item["answer"]
    steps, marker, result = item["metadata"]["answer_cot"].rpartition(ANSWER_MARKER)
    if not marker or float(result.replace(",", "")) != float(answer):
        return None
    prompt = f"{item['question']}\n{MATH_INSTRUCTION}"
    solution = f"{steps.rstrip()}\nThe final answer is \\boxed{{{answer}}}."
    return Example(prompt, answer, (solution,), SOURCE)


def _distinct_examples(seed: int) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():  # raised when reasoning_gym is first imported
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym  # takes seconds to import
    except ImportError as error:
        raise UserError(
            "data.source=gsm_symbolic: reasoning-gym is not installed; pip install 'trapo-jax[tasks]'"
        ) from error
    # Item i of a dataset is generated from seed + i, so datasets with adjacent seeds would share almost all items.
    seeds = random.Random(seed)
    seen: set[str] = set()
    while True:
        # A reasoning_gym dataset allocates one entry per item, so several moderately sized ones are created instead of
        # a huge one.
        block = reasoning_gym.create_dataset(SOURCE, seed=seeds.getrandbits(48), size=BLOCK_SIZE)
        for index in range(BLOCK_SIZE):
            example = gsm_symbolic_example(block[index])
            if example is None or example.prompt in seen:
                continue
            assert isinstance(example.prompt, str)
            seen.add(example.prompt)
            yield example
