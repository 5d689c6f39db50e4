"""One interface for cheap graders and for those that need processes of their own."""

import difflib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, Self

from trapo_jax.import_path import import_object
from trapo_jax.rewards.by_source import grade_by_source
from trapo_jax.rewards.card_shuffles import card_shuffles_grader
from trapo_jax.rewards.math import grade_math
from trapo_jax.rewards.multiple_choice import grade_multiple_choice
from trapo_jax.rewards.pool import MAX_RESPONSE_CHARS, GraderPool
from trapo_jax.rewards.verdicts import as_verdict
from trapo_jax.types import Problem, UserError, Verdict

RewardFunction = Callable[[str, Problem], Any]  # a verdict, a bool, or a reward of 0 or 1
# Reward functions that a hostile response can keep busy, which run in processes that can be killed.
POOLED: dict[str, RewardFunction] = {"math": grade_math, "by_source": grade_by_source}
GRADERS = ("card_shuffles", "multiple_choice", *POOLED)

logger = logging.getLogger(__name__)


class Grader(Protocol):
    """Judges responses, now or later."""

    def submit(self, response_text: str, problem: Problem) -> Future[Verdict]:
        """Asks for a verdict. Any text is fine: what goes wrong with it is a verdict as well.

        Raises:
          RuntimeError: after `close`.
        """
        ...

    def close(self) -> None:
        """Ends what was started; verdicts still missing are cancelled."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_) -> None: ...


class InlineGrader:
    """Judges at once, in this process: only for functions that take microseconds on any text."""

    def __init__(self, reward_function: RewardFunction):
        self._reward_function = reward_function
        self._reasons: set[str] = set()

    def submit(self, response_text: str, problem: Problem) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        try:
            future.set_result(as_verdict(self._reward_function(response_text, problem)))
        except Exception as error:
            reason = f"grader: error ({type(error).__name__})"
            logger.log(logging.DEBUG if reason in self._reasons else logging.WARNING, reason)
            self._reasons.add(reason)
            future.set_result(Verdict.ERROR)
        return future

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_grader(
    name: str,
    *,
    eos_text: str,
    num_workers: int,
    timeout_secs: float,
    max_response_chars: int = MAX_RESPONSE_CHARS,
) -> Grader:
    """Builds a grader.

    Args:
      name: a name in `GRADERS`, or the import path `package.module:name` of a reward function of your own. It runs in
        worker processes, as "math" and "by_source" do; its module must not import jax there.
      eos_text: the tokenizer's EOS, with which a card-shuffles response must end.
      num_workers, timeout_secs, max_response_chars: see `GraderPool`.

    Raises:
      UserError: if there is no such grader.
    """
    if name == "card_shuffles":
        return InlineGrader(card_shuffles_grader(eos_text))
    if name == "multiple_choice":
        return InlineGrader(grade_multiple_choice)
    return GraderPool(
        _find_reward_function(name),
        num_workers=num_workers,
        timeout_secs=timeout_secs,
        max_response_chars=max_response_chars,
    )


def _find_reward_function(name: str) -> RewardFunction:
    """Returns a reward function that runs in worker processes."""
    if ":" not in name:
        if name in POOLED:
            return POOLED[name]
        close = difflib.get_close_matches(name, GRADERS, n=1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(GRADERS)}"
        raise UserError(f"rewards.grader={name!r}: no such grader; {known}")
    function = import_object(name, "rewards.grader")
    if not callable(function):
        raise UserError(f"rewards.grader={name}: not a function of a response and its problem")
    return function
