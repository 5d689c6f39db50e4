"""Generates card shuffles, the built-in task.

A prompt consists of K distinct operations and five distinct digits. The answer is the digits after all operations have
been applied::

    prompt    ?rsm:48137=
    expert    r73184;s37184;m38174;#38174

The expert solutions are correct but careless in style: 8% of the steps are preceded by a filler word (such as `hm,`),
and 8% of the steps are leaps that apply two operations at once (`ts62937;`). A model that imitates the solutions token
by token learns these habits as well. Solutions in the clean style have neither filler words nor leaps.
"""

import random
from collections.abc import Callable, Iterator
from typing import Literal

from trapo_jax.data.examples import Example

OPERATIONS: dict[str, Callable[[str], str]] = {
    "r": lambda d: d[::-1],  # reverse
    "l": lambda d: d[1:] + d[0],  # rotate left
    "t": lambda d: d[-1] + d[:-1],  # rotate right
    "s": lambda d: d[1] + d[0] + d[2:],  # swap the first two
    "e": lambda d: d[:3] + d[4] + d[3],  # swap the last two
    "x": lambda d: d[4] + d[1:4] + d[0],  # swap the ends
    "m": lambda d: d[0] + d[3] + d[2] + d[1] + d[4],  # swap positions 2 and 4
}
# An operation that the base model has never seen. With the difficulty "early", every program begins with it.
UNFAMILIAR = "o"
UNFAMILIAR_OPERATION: Callable[[str], str] = lambda d: d[2] + d[1] + d[0] + d[3:]  # swap 1 and 3
FILLERS = ("hm,", "ok,", "so,", "um,")
FILLER_RATE = 0.08
LEAP_RATE = 0.08
NUM_DIGITS = 5

Difficulty = Literal["late", "early"]
Style = Literal["careless", "clean"]


def apply_operation(name: str, digits: str) -> str:
    """Returns the digits after one operation.

    >>> apply_operation("r", "48137")
    '73184'
    """
    operation = UNFAMILIAR_OPERATION if name == UNFAMILIAR else OPERATIONS[name]
    return operation(digits)


def card_shuffles_splits(
    *,
    seed: int,
    num_train: int,
    num_validation: int,
    num_test: int,
    difficulty: Difficulty = "late",
    style: Style = "careless",
) -> dict[str, list[Example]]:
    """Returns train, validation and test examples with disjoint prompts.

    Args:
      seed: random seed, which determines all examples.
      num_train, num_validation, num_test: sizes of the splits.
      difficulty: with "late", prompts have 3 to 5 familiar operations, of which the base model can follow no more than
        3, so that solutions become hard late. With "early", prompts begin with an operation that the base model has
        never seen, followed by 1 or 2 familiar ones.
      style: the style of the expert solutions; it does not affect the prompts.
    """
    rng = random.Random(seed)
    sizes = {"validation": num_validation, "test": num_test, "train": num_train}
    stream = _distinct_examples(rng, difficulty, style)
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def expert_trace(rng: random.Random, program: str, digits: str, *, noise: bool = True) -> str:
    """Returns the worked solution; with `noise`, in the careless style described in the module docstring."""
    steps, rest = [], program
    while rest:
        leap = noise and len(rest) > 1 and rng.random() < LEAP_RATE
        operations, rest = (rest[:2], rest[2:]) if leap else (rest[:1], rest[1:])
        for name in operations:
            digits = apply_operation(name, digits)
        filler = rng.choice(FILLERS) if noise and rng.random() < FILLER_RATE else ""
        steps.append(f"{filler}{operations}{digits};")
    return "".join(steps) + "#" + digits


def random_digits(rng: random.Random) -> str:
    return "".join(rng.sample("0123456789", NUM_DIGITS))


def random_program(rng: random.Random, length: int) -> str:
    return "".join(rng.sample(list(OPERATIONS), length))


def _distinct_examples(
    rng: random.Random, difficulty: Difficulty, style: Style
) -> Iterator[Example]:
    seen: set[str] = set()
    while True:
        if difficulty == "late":
            program = random_program(rng, rng.choice((3, 4, 5)))
        else:
            program = UNFAMILIAR + random_program(rng, rng.choice((1, 2)))
        digits = random_digits(rng)
        prompt = f"?{program}:{digits}="
        # Drawn in the clean style too, so that later examples get the same random numbers in both styles.
        solution = expert_trace(rng, program, digits)
        if style == "clean":
            solution = expert_trace(rng, program, digits, noise=False)
        if prompt in seen:
            continue
        seen.add(prompt)
        yield Example(prompt, solution[-NUM_DIGITS:], (solution,), f"K={len(program)}")
