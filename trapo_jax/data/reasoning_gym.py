"""Generates problems of reasoning-gym's tasks (extra `tasks`), with expert solutions for those in `SOLUTIONS`.

The prompt is the task's question. An expert solution consists of worked steps and a last line with the answer, in the
form that `data.prompt_suffix` asks for. Each example's columns contain the metadata with which the reward function
`reasoning_gym` scores answers.
"""

import dataclasses
import difflib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any

from trapo_jax.data.examples import Example
from trapo_jax.data.instructions import LAST_LINES
from trapo_jax.rewards.reasoning_gym import FULL_SCORE, import_reasoning_gym, score
from trapo_jax.types import UserError

METADATA = "metadata"  # column with the metadata of an item
ANSWER_MARKER = "####"
BLOCK_SIZE = 1000
MAX_ATTEMPTS = 1000  # A task is exhausted after this many items in a row without a new example.


def reasoning_gym_splits(
    task: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    num_train: int,
    num_validation: int,
    num_test: int,
    last_line: str = LAST_LINES["boxed"],
) -> dict[str, list[Example]]:
    """Returns train, validation and test examples of a task, with disjoint questions.

    Args:
      task: name of a reasoning-gym dataset, such as "chain_sum".
      options: options of the dataset that set its difficulty, such as {"min_terms": 3, "max_terms": 3}.
      seed: determines everything for a given version of reasoning-gym.
      num_train, num_validation, num_test: sizes of the splits.
      last_line: format string of the last line of expert solutions, to which the answer is passed.

    Raises:
      UserError: if reasoning-gym is not installed, the task or an option is unknown or invalid, the task's own answers
        cannot be scored, or the task does not have enough different questions.
    """
    sizes = {"validation": num_validation, "test": num_test, "train": num_train}
    stream = _distinct_examples(task, options, seed, last_line)
    splits: dict[str, list[Example]] = {}
    for name, size in sizes.items():
        splits[name] = list(islice(stream, size))
        if len(splits[name]) < size:
            total = sum(map(len, splits.values()))
            if not total:
                raise UserError(
                    f"data.task={task}: the task's own answers are not scored as correct"
                )
            raise UserError(
                f"data.task={task}: only {total:,} different questions found, but {sum(sizes.values()):,} are needed; "
                "lower data.num_train, data.num_validation or data.num_test, or raise the difficulty in data.task_options"
            )
    return splits


def _distinct_examples(
    task: str, options: Mapping[str, Any], seed: int, last_line: str
) -> Iterator[Example]:
    """Yields examples with distinct questions until no new ones are found."""
    try:
        gym = import_reasoning_gym()
    except UserError as error:
        raise UserError(f"data.source=reasoning_gym: {error}") from error
    # Item i is drawn from seed + i, so adjacent seeds would share almost all problems.
    seeds = random.Random(seed)
    seen: set[str] = set()
    num_failed = 0
    while True:
        # A dataset holds one entry per item, so several of moderate size are created instead of a huge one.
        for item in _generate(gym, task, options, seeds.getrandbits(48)):
            # As reward functions will see it. Some metadata contain fractions, which become strings.
            item["metadata"] = json.loads(json.dumps(item["metadata"], default=str))
            if item["question"] in seen or not _is_scorable(task, item):
                num_failed += 1
                if num_failed == MAX_ATTEMPTS:
                    return
                continue
            num_failed = 0
            seen.add(item["question"])
            yield reasoning_gym_example(task, item, last_line)


def _generate(
    gym: ModuleType, task: str, options: Mapping[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the items of a dataset of `BLOCK_SIZE` items.

    Raises:
      UserError: if the task or an option is unknown, or the options are invalid.
    """
    known_tasks = gym.factory.DATASETS
    if task not in known_tasks:
        close = difflib.get_close_matches(task, known_tasks, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"reasoning-gym has {len(known_tasks)} tasks"
        )
        raise UserError(f"data.task={task}: no such task; {hint}")
    fields = {field.name for field in dataclasses.fields(known_tasks[task][1])} - {"seed", "size"}
    for name in options:
        if name not in fields:
            raise UserError(
                f"data.task_options.{name}: {task} has no such option; available: {', '.join(sorted(fields))}"
            )
    try:
        dataset = gym.create_dataset(task, **options, seed=seed, size=BLOCK_SIZE)
        yield from (dataset[index] for index in range(BLOCK_SIZE))
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        given = json.dumps(dict(options))
        raise UserError(f"data.task_options={given}: {task} rejects them ({error})") from error


def _is_scorable(task: str, item: Mapping[str, Any]) -> bool:
    """Returns whether the task gives the full score to its own answer."""
    answer = item["answer"]
    return isinstance(answer, str) and score(task, answer, answer, item["metadata"]) == FULL_SCORE


def reasoning_gym_example(task: str, item: Mapping[str, Any], last_line: str) -> Example:
    """Returns the example for an item of a reasoning-gym dataset."""
    solve = SOLUTIONS.get(task)
    steps = solve(item) if solve else None
    solutions = (f"{steps}\n{last_line.format(item['answer'])}",) if steps else ()
    columns = {METADATA: item["metadata"]}
    return Example(item["question"], item["answer"], solutions, task, columns)


def _running_totals(item: Mapping[str, Any]) -> str:
    """Solves a sum from left to right.

    >>> print(_running_totals({"metadata": {"expression": "4 - 1 - 7"}}))
    Calculate from left to right.
    4 - 1 = 3
    3 - 7 = -4
    """
    first, *rest = item["metadata"]["expression"].split()
    total, lines = int(first), ["Calculate from left to right."]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {new}")
        total = new
    return "\n".join(lines)


def _letters_backward(item: Mapping[str, Any]) -> str:
    """Spells a word backward, letter by letter.

    >>> print(_letters_backward({"metadata": {"word": "nus"}}))
    The letters of "nus" are n, u, s.
    From last to first, they are s, u, n.
    """
    word = item["metadata"]["word"]
    forward, backward = ", ".join(word), ", ".join(reversed(word))
    return f'The letters of "{word}" are {forward}.\nFrom last to first, they are {backward}.'


def _worked_solution(item: Mapping[str, Any]) -> str | None:
    """Returns the worked solution of `gsm_symbolic` without its last line, `#### 42`; None if it is inconsistent."""
    steps, marker, result = item["metadata"]["answer_cot"].rpartition(ANSWER_MARKER)
    if not marker or float(result.replace(",", "")) != float(item["answer"]):
        return None
    return steps.rstrip()


# Functions that return the steps of an expert solution, or None if an item has none, keyed by task.
SOLUTIONS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "chain_sum": _running_totals,
    "gsm_symbolic": _worked_solution,
    "spell_backward": _letters_backward,
}
