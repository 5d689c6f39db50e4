"""Grades responses with one or more reward functions, which the config selects by name.

To add a built-in function, write it in a module of its own and list it in `IN_WORKERS`. A function that no response can
keep busy may instead run inline: list it in `REWARD_FUNCTIONS` and return it from `_find`. To use a function of your
own, select it by its import path; this requires no change here.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Self

from trapo_jax.inputs.import_path import import_object, suggest
from trapo_jax.rewards.card_shuffles import card_shuffles_grader
from trapo_jax.rewards.judgments import call, reason_of
from trapo_jax.rewards.math import grade_math, grade_math_lenient
from trapo_jax.rewards.multiple_choice import grade_multiple_choice
from trapo_jax.rewards.pool import (
    MAX_RESPONSE_CHARS,
    FailureLog,
    GraderPool,
    RewardFunction,
    path_of,
)
from trapo_jax.rewards.reasoning_gym import grade_reasoning_gym
from trapo_jax.types import Grade, Judgment, Problem, UserError, find_by_source

# Names that a config may use. Functions that a hostile response could keep busy run in workers, which can be killed.
IN_WORKERS: dict[str, RewardFunction] = {
    "math": grade_math,
    "math_lenient": grade_math_lenient,
    "reasoning_gym": grade_reasoning_gym,
}
REWARD_FUNCTIONS = ("card_shuffles", "multiple_choice", *IN_WORKERS)


class WeightedFunction(NamedTuple):
    """A reward function and its weight in the reward.

    Attributes:
      name: name of the function in metrics and samples.
      function: called as `function(response, problem, **columns)`; see `judgments.call`.
      weight: weight in the mean, > 0.
      is_inline: whether to call the function directly instead of in a worker; only for functions that are fast on any
        text.
      sees_special_tokens: whether the responses passed to the function include special tokens.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    is_inline: bool = False
    sees_special_tokens: bool = False


class Grader:
    """Grades responses asynchronously.

    The reward is the weighted mean of the functions' rewards. Missing rewards are excluded from the mean. The first
    function decides whether a response is correct; if its reward is missing, the reward of the response is missing.

    Args:
      functions: the reward functions; the first decides whether a response is correct. If empty, every reward is
        missing.
      by_source: maps `fnmatch` patterns of problem sources to functions that replace the first function. Matching is
        case-insensitive, and the first match is used.
      special_tokens: special tokens, as text, that are removed from responses.
      pool_options: keyword arguments of `GraderPool`.
    """

    def __init__(
        self,
        functions: Sequence[WeightedFunction],
        *,
        by_source: Mapping[str, WeightedFunction] | None = None,
        special_tokens: Sequence[str] = (),
        **pool_options: Any,
    ):
        self._functions = list(functions)
        self._by_source = dict(by_source or {})
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        in_pool = [f.function for f in (*functions, *self._by_source.values()) if not f.is_inline]
        unique = {path_of(function): function for function in in_pool}
        self._failures = FailureLog()
        self._pool = (
            GraderPool(*unique.values(), failures=self._failures, **pool_options)
            if unique
            else None
        )

    def without_warnings(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager that disables the logging of failures. Grades still record them."""
        return self._failures.muted()

    def submit(self, response: str, problem: Problem) -> Future[Grade]:
        """Grades a response asynchronously. If a reward function fails, the grade records that; nothing is raised.

        The future raises `OSError` if the system cannot start a grading process.

        Args:
          response: the response with special tokens, as decoded by the tokenizer.
          problem: the problem.

        Raises:
          RuntimeError: if the grader has been closed.
        """
        plain = self._special_token.sub(" ", response) if self._special_token else response
        functions = self._functions_for(problem.source)
        if not functions:
            ungraded: Future[Grade] = Future()
            ungraded.set_result(Grade(None, {}))
            return ungraded
        futures = [
            self._judge(f, response if f.sees_special_tokens else plain, problem) for f in functions
        ]
        return _when_all_done(futures, lambda judgments: combine(functions, judgments))

    def are_equal(self, first: str, second: str) -> bool:
        """Compares two answers: by mathematical equivalence if the first function is "math", otherwise as strings."""
        if self._functions[0].function is not grade_math:
            return first == second
        return (
            self._judge(self._functions[0], rf"\boxed{{{second}}}", Problem("", (), first))
            .result()
            .reward
            == 1.0
        )

    def _functions_for(self, source: str) -> list[WeightedFunction]:
        function = find_by_source(self._by_source, source)
        return [function, *self._functions[1:]] if function else self._functions

    def _judge(
        self, function: WeightedFunction, response: str, problem: Problem
    ) -> Future[Judgment]:
        if not function.is_inline:
            assert self._pool is not None
            return self._pool.submit(response, problem, function.function)
        future: Future[Judgment] = Future()
        try:
            future.set_result(call(function.function, response, problem))
        except Exception as error:
            reason = reason_of(error)
            self._failures.report(function.name, reason)
            future.set_result(Judgment(None, reason=reason))
        return future

    def close(self) -> None:
        """Terminates the grading processes and cancels pending grades."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def combine(functions: Sequence[WeightedFunction], judgments: Sequence[Judgment]) -> Grade:
    """Combines the judgments of reward functions into a grade; see `Grader`."""
    by_name = {f.name: judgment for f, judgment in zip(functions, judgments, strict=True)}
    if judgments[0].reward is None:
        return Grade(None, by_name)
    present = [
        (f.weight, j.reward)
        for f, j in zip(functions, judgments, strict=True)
        if j.reward is not None
    ]
    total = sum(weight for weight, _ in present)
    return Grade(min(1.0, sum(weight * reward for weight, reward in present) / total), by_name)


def make_grader(
    names: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    by_source: Mapping[str, str] | None = None,
    eos_text: str = "",
    special_tokens: Sequence[str] = (),
    num_workers: int = 2,
    timeout_secs: float = 5.0,
    max_response_chars: int = MAX_RESPONSE_CHARS,
    environment: Sequence[str] = (),
) -> Grader:
    """Builds a grader from the names of reward functions.

    Args:
      names: names in `REWARD_FUNCTIONS`, or import paths `package.module:name` of your own functions. These run in
        worker processes, so their modules must not import JAX.
      weights: the weight of each function; equal weights if None.
      by_source: maps patterns of problem sources to names of functions; see `Grader`.
      eos_text: the tokenizer's EOS token, which is required at the end of a card-shuffles response.
      special_tokens: special tokens, as text, that are removed from responses.
      num_workers, timeout_secs, max_response_chars, environment: see `GraderPool`.

    Raises:
      UserError: if a function does not exist.
    """
    weights = weights or [1.0] * len(names)
    find = lambda name, field, weight: _find(name, field, weight, eos_text)
    functions = [
        find(*item) for item in zip(names, ["rewards.functions"] * len(names), weights, strict=True)
    ]
    # Functions of different modules, such as a:f and b:f, may have the same name.
    if len({function.name for function in functions}) < len(functions):
        functions = [f._replace(name=name) for f, name in zip(functions, names, strict=True)]
    return Grader(
        functions,
        by_source={
            pattern: find(name, f"rewards.by_source.{pattern}", weights[0])
            for pattern, name in (by_source or {}).items()
        },
        special_tokens=special_tokens,
        num_workers=num_workers,
        timeout_secs=timeout_secs,
        max_response_chars=max_response_chars,
        environment=environment,
    )


def special_tokens(tokenizer: Any) -> list[str]:
    """Returns the tokenizer's special tokens as text, including tokens added by the model folder."""
    added = tokenizer.added_tokens_decoder.values()
    return list(
        dict.fromkeys([*tokenizer.all_special_tokens, *(t.content for t in added if t.special)])
    )


def _find(name: str, field: str, weight: float, eos_text: str) -> WeightedFunction:
    """Returns the reward function with a given name or import path."""
    if name == "card_shuffles":
        function = card_shuffles_grader(eos_text)
        return WeightedFunction(name, function, weight, is_inline=True, sees_special_tokens=True)
    if name == "multiple_choice":
        return WeightedFunction(name, grade_multiple_choice, weight, is_inline=True)
    if name in IN_WORKERS:
        return WeightedFunction(name, IN_WORKERS[name], weight)
    if ":" not in name:
        known = suggest(name, REWARD_FUNCTIONS)
        raise UserError(f"{field}={name!r}: no such reward function; {known}")
    function = import_object(name, field)
    if not callable(function):
        raise UserError(f"{field}={name}: not a function; expected function(response, problem)")
    try:
        path_of(function)
    except (AttributeError, ValueError):
        raise UserError(
            f"{field}={name}: not a function defined at the top level of its module"
        ) from None
    return WeightedFunction(name.rpartition(":")[2], function, weight)


def _when_all_done(
    futures: Sequence[Future[Judgment]], make: Callable[[list[Judgment]], Grade]
) -> Future[Grade]:
    """Returns a future of `make(results)`. If any of the given futures is canceled or raises, so does this future."""
    combined: Future[Grade] = Future()
    lock, num_pending = threading.Lock(), len(futures)

    def on_done(future: Future[Judgment]) -> None:
        nonlocal num_pending
        with lock:
            num_pending -= 1
            is_last = num_pending == 0
        if future.cancelled():
            combined.cancel()
        elif is_last and combined.set_running_or_notify_cancel():
            if error := next(filter(None, (f.exception() for f in futures)), None):
                combined.set_exception(error)
            else:
                combined.set_result(make([f.result() for f in futures]))

    for future in futures:
        future.add_done_callback(on_done)
    return combined
