"""Calls a reward function and converts its result to a judgment."""

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from trapo_jax.inputs.printable import first_line
from trapo_jax.types import Judgment, Problem, Verdict

# Maximum lengths of an answer and of the reason for a missing reward, as shown to the user.
MAX_ANSWER_CHARS, MAX_REASON_CHARS = 500, 200


class InvalidReward(ValueError):
    """A reward function returned something other than a reward."""


def call(function: Callable[..., Any], response: str, problem: Problem) -> Judgment:
    """Calls a sync or async reward function with the problem's columns that its signature accepts.

    Raises:
      InvalidReward: if the function's result is not a valid reward.
      Exception: any exception that the function raises.
    """
    value = function(response, problem, **_accepted(function, problem))
    if inspect.isawaitable(value):
        value = asyncio.run(_wait_for(value))
    return as_judgment(value)


def as_judgment(value: Any) -> Judgment:
    """Converts the result of a reward function to a judgment.

    Args:
      value: a reward in [0, 1], a bool, or a `Verdict` or its value; or a pair of one of these and the answer that the
        function extracted from the response.

    Raises:
      InvalidReward: if `value` is anything else.

    >>> as_judgment(0.5).found_answer, as_judgment((0.0, None)).found_answer
    (None, False)
    >>> as_judgment((True, "42"))
    Judgment(reward=1.0, answer='42', reason='', found_answer=True)
    """
    looks_for_answer = isinstance(value, tuple) and len(value) == 2
    value, answer = value if looks_for_answer else (value, None)
    found_answer = answer is not None if looks_for_answer else None
    answer = None if answer is None else str(answer)[:MAX_ANSWER_CHARS]
    if isinstance(value, str) and value in tuple(Verdict):
        verdict = Verdict(value)
        if verdict in (Verdict.ERROR, Verdict.TIMEOUT):
            return Judgment(None, answer, str(verdict))
        return Judgment(float(verdict is Verdict.CORRECT), answer, found_answer=found_answer)
    try:
        reward = -1.0 if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        reward = -1.0
    if not 0.0 <= reward <= 1.0:
        raise InvalidReward(
            f"the function returned {value!r:.60}; expected a number in [0, 1] or a verdict"
        )
    return Judgment(reward, answer, found_answer=found_answer)


def reason_of(error: BaseException) -> str:
    """Converts an exception raised by a reward function to the reason for a missing reward; see `Judgment.reason`."""
    try:
        message = str(error)
    except Exception:  # raised by a user-defined `__str__`
        message = ""
    name = type(error).__name__
    return first_line(f"{name}: {message.strip()}" if message.strip() else name, MAX_REASON_CHARS)


def kind_of(reason: str) -> str:
    """Returns a reason without the exception's message, which may differ between responses."""
    return reason.partition(": ")[0]


def describe_reason(reason: str) -> str:
    """Returns a reason as shown to the user; a timeout also names the config field that sets the limit.

    >>> describe_reason("timeout")
    'timeout (rewards.timeout_secs)'
    """
    return f"{reason} (rewards.timeout_secs)" if reason == Verdict.TIMEOUT else reason


def describe_reasons(reasons: Iterable[str]) -> str:
    """Returns the three most frequent kinds of reasons as text: the count and the first message of each kind.

    >>> describe_reasons(["KeyError: 'a'", "timeout", "KeyError: 'b'"])
    "2 x KeyError: 'a', 1 x timeout (rewards.timeout_secs)"
    """
    firsts: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason in reasons:
        firsts.setdefault(kind_of(reason), reason)
        counts[kind_of(reason)] += 1
    return ", ".join(
        f"{count} x {describe_reason(firsts[kind])}" for kind, count in counts.most_common(3)
    )


def _accepted(function: Callable[..., Any], problem: Problem) -> dict[str, Any]:
    """Returns the columns that match the function's parameters, or all columns if it accepts arbitrary keywords."""
    if not problem.columns:
        return {}
    parameters = list(inspect.signature(function).parameters.values())[2:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(problem.columns)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in problem.columns.items() if name in names}


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable
