"""Defines rollouts: requests, completions, and grades."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

from trapo_jax.types.problems import Problem


@dataclasses.dataclass(frozen=True)
class MicroGroup:
    """A micro-group of `size` rollouts of a problem.

    The rollouts start from an expert prefix with the guidance ratio `ratio` if the mean reward of all earlier rollouts
    of the problem is below `threshold`; otherwise, they are unguided.
    """

    size: int
    ratio: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """A request to sample one rollout.

    Attributes:
      problem: the problem to solve.
      sample_index: index within the group, in [0, G - 1].
      micro_group: index of the micro-group.
      expert_index: index of the expert solution that guides the rollout; -1 if unguided.
      prefix_len: length of the expert prefix that the rollout starts from; 0 if unguided.
      ratio: the guidance ratio that determined the prefix; 0.0 if unguided.
    """

    problem: Problem
    sample_index: int
    micro_group: int = 0
    expert_index: int = -1
    prefix_len: int = 0
    ratio: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """The problem id and sample index, which identify the rollout within a step."""
        return self.problem.id, self.sample_index

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        if self.prefix_len == 0:
            return ()
        return self.problem.experts[self.expert_index].token_ids[: self.prefix_len]

    @property
    def start_len(self) -> int:
        """The number of tokens before the first sampled token: the prompt and the prefix."""
        return len(self.problem.prompt_ids) + self.prefix_len


class FinishReason(enum.StrEnum):
    STOP = "stop"  # the model sampled EOS
    LENGTH = "length"  # prefix + completion reached max_completion_length
    NOT_SAMPLED = "not_sampled"  # the response is the whole expert solution
    UNFINISHED = "unfinished"  # released by the engine; `resume` continues it


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The parameters of token sampling.

    Attributes:
      temperature: sampling temperature, >= 0; 0 decodes greedily.
      top_p: in (0, 1]; only the smallest set of most likely tokens whose total probability reaches `top_p` is sampled
        from. Used only in evaluation.
      top_k: >= 0; only the `top_k` most likely tokens are sampled from, or all tokens if 0. Used only in evaluation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """The engine's result for a request.

    A completion contains the sampled tokens, including EOS, and the log-probability of each token under the
    temperature-scaled distribution from which it was sampled.
    """

    request: RolloutRequest
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def __post_init__(self):
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens, but {len(self.logprobs)} logprobs")


class SamplingProgress(NamedTuple):
    """A process's progress in sampling and grading since its previous report.

    Attributes:
      phase: the next phase: "prefilling", "sampling", or "grading" if nothing is left to sample.
      num_graded: number of graded completions.
      num_sampled_tokens: number of sampled tokens.
      num_prefilled_tokens: number of prefilled prompt and prefix tokens.
    """

    phase: str
    num_graded: int
    num_sampled_tokens: int
    num_prefilled_tokens: int


class Verdict(enum.StrEnum):
    """The verdicts that a reward function may return instead of a number. ERROR and TIMEOUT mean a missing reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"
    TIMEOUT = "timeout"


class Judgment(NamedTuple):
    """One reward function's judgment of a response.

    Attributes:
      reward: the reward in [0, 1]; None if it is missing because the function failed or exceeded its time limit.
      answer: the answer that the function extracted from the response, if it extracts one.
      reason: why the reward is missing: "timeout", or an exception's type followed, if it has a message, by ": " and
        the first line of the message.
      found_answer: whether the function found an answer in the response; None if it looks for none or failed.
    """

    reward: float | None
    answer: str | None = None
    reason: str = ""
    found_answer: bool | None = None

    @property
    def verdict(self) -> Verdict:
        """The judgment as a verdict. Only a reward of 1 is CORRECT."""
        if self.reward is not None:
            return Verdict.CORRECT if self.reward == 1.0 else Verdict.WRONG
        return Verdict.TIMEOUT if self.reason == Verdict.TIMEOUT else Verdict.ERROR


@dataclasses.dataclass(frozen=True)
class Grade:
    """All reward functions' judgments of a response, and the combined reward.

    Attributes:
      reward: the reward in [0, 1]; None if it is missing, in which case the rollout is excluded from all means and
        gradients.
      judgments: judgments, keyed by reward function. The first one decides whether the response is correct.
    """

    reward: float | None
    judgments: Mapping[str, Judgment]

    @property
    def is_correct(self) -> bool:
        """Whether the reward of the first reward function is 1."""
        first = next(iter(self.judgments.values()), None)  # None if the problem has no answer
        return first is not None and first.reward == 1.0

    @property
    def answer(self) -> str | None:
        """The answer from the first reward function that extracts one from the response."""
        answers = (judgment.answer for judgment in self.judgments.values())
        return next((answer for answer in answers if answer is not None), None)

    @property
    def found_answer(self) -> bool | None:
        """Whether the first reward function found an answer in the response; None if it looks for none or failed."""
        first = next(iter(self.judgments.values()), None)
        return first.found_answer if first else None

    @property
    def missing(self) -> dict[str, str]:
        """The reasons for missing rewards, keyed by reward function."""
        return {name: j.reason for name, j in self.judgments.items() if j.reward is None}

    def as_record(self) -> dict[str, Any]:
        """Returns the fields that all sample records share.

        These are `answer` (extracted from the response), `is_correct`, `reward`, `rewards` (keyed by reward function),
        and `missing` (the reasons for missing rewards, keyed by reward function).
        """
        return {
            "answer": self.answer,
            "is_correct": self.is_correct,
            "reward": self.reward,
            "rewards": {name: judgment.reward for name, judgment in self.judgments.items()},
            "missing": self.missing,
        }


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A completion with its grade."""

    completion: Completion
    grade: Grade

    @property
    def request(self) -> RolloutRequest:
        return self.completion.request

    @property
    def reward(self) -> float:
        """The reward in [0, 1].

        Raises:
          ValueError: if the reward is missing. Rollouts with missing rewards are removed before rewards are used.
        """
        if self.grade.reward is None:
            raise ValueError(f"the reward of rollout {self.request.key} is missing")
        return self.grade.reward
