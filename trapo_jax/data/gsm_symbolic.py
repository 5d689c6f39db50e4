"""Grade-school word problems made by reasoning-gym's `gsm_symbolic` (extra `tasks`).

The user text is the question and, in a line of its own, the instruction of the template `qwen_math`: reason step by
step, final answer in `\\boxed{}`. The expert is reasoning-gym's worked solution with its last line, `#### 42`,
rewritten as `The final answer is \\boxed{42}.`; it is in the form that the prompt asks for.
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
    """Train, validation and test examples, disjoint by prompt.

    All splits share reasoning-gym's few dozen stories; names, things and numbers differ.

    Args:
      seed: determines everything, given the version of reasoning-gym.
      num_train, num_validation, num_test: sizes of the splits.

    Raises:
      UserError: if reasoning-gym is not installed.
    """
    sizes = {"validation": num_validation, "test": num_test, "train": num_train}
    stream = _distinct_examples(seed)
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def gsm_symbolic_example(item: dict[str, Any]) -> Example | None:
    """The example of one of reasoning-gym's items; None if its worked solution misses its answer."""
    answer = item["answer"]
    steps, marker, result = item["metadata"]["answer_cot"].rpartition(ANSWER_MARKER)
    if not marker or float(result.replace(",", "")) != float(answer):
        return None
    prompt = f"{item['question']}\n{MATH_INSTRUCTION}"
    solution = f"{steps.rstrip()}\nThe final answer is \\boxed{{{answer}}}."
    return Example(prompt, answer, (solution,), SOURCE)


def _distinct_examples(seed: int) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():  # of what it imports, on the first time
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym  # seconds to import
    except ImportError as error:
        raise UserError(
            "data.source=gsm_symbolic: reasoning-gym is not installed; pip install 'trapo-jax[tasks]'"
        ) from error
    # Item i is drawn from seed + i: seeds next to each other would share almost all problems.
    seeds = random.Random(seed)
    seen: set[str] = set()
    while True:
        # A data set holds a list as long as itself, so many of moderate size.
        block = reasoning_gym.create_dataset(SOURCE, seed=seeds.getrandbits(48), size=BLOCK_SIZE)
        for index in range(BLOCK_SIZE):
            example = gsm_symbolic_example(block[index])
            if example is None or example.prompt in seen:
                continue
            assert isinstance(example.prompt, str)
            seen.add(example.prompt)
            yield example
