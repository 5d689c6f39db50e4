"""The words the rooms share: what a problem, a request, a rollout and a training batch are.

Nothing here computes. Every stage imports this module and no other stage.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

BATCH_AXES = ("data", "fsdp")  # of the mesh: along which rows of a batch are split
TENSOR_AXIS = "tp"  # along which heads, MLP and vocabulary are


# Where an expert prefix may end: at the exact token, or at the end of a paragraph.
PrefixBoundary = Literal["exact", "paragraph"]
# Which part of an expert's text is trained: the inside of `<think>...</think>` where there is one, or all of it.
ExpertPart = Literal["thought", "whole"]


class UserError(Exception):
    """An error that the user can fix. Commands print it as one line without a traceback and exit with code 2."""


class TrainingFailed(Exception):
    """Training cannot continue; what has been committed stays. Commands exit with code 1."""


class Interrupted(Exception):
    """A signal asked the process to stop. What is saved stays, and the same command resumes."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert solution of a problem, as the policy's tokens.

    Attributes:
      token_ids: the solution with EOS appended.
      paragraph_ends: prefix lengths, ascending, whose last token contains or completes a blank line.
    """

    token_ids: tuple[int, ...]
    paragraph_ends: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One training or evaluation problem.

    Attributes:
      id: 16 hexadecimal digits from the content; equal content, equal id.
      prompt_ids: the prompt after the chat template.
      answer: what the grader compares with.
      experts: zero or more expert solutions, in order of preference.
      prompt_text: for people.
      source: the name under which results are grouped (data source, difficulty).
      columns: further columns of the row, for reward functions; JSON-serializable.
    """

    id: str
    prompt_ids: tuple[int, ...]
    answer: str
    experts: tuple[Expert, ...] = ()
    prompt_text: str = ""
    source: str = ""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def key(self) -> int:
        """The id's first 32 bits, for random keys."""
        return int(self.id[:8], 16)


@dataclasses.dataclass(frozen=True)
class MicroGroup:
    """`size` rollouts that start from the expert prefix of ratio `ratio` if the mean reward of all
    earlier rollouts of the problem is below `threshold`, and unguided otherwise."""

    size: int
    ratio: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """One rollout to be sampled.

    Attributes:
      problem: what it is about.
      sample_index: 0 .. G-1 within the group.
      micro_group: index of its micro-group.
      expert_index: which of the problem's experts guides it; -1 if unguided.
      prefix_len: tokens of that expert the rollout starts from; 0 if unguided.
      ratio: the guidance ratio the prefix was cut at; 0.0 if unguided.
    """

    problem: Problem
    sample_index: int
    micro_group: int = 0
    expert_index: int = -1
    prefix_len: int = 0
    ratio: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the rollout among those of a step: problem id and sample index."""
        return self.problem.id, self.sample_index

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        if self.prefix_len == 0:
            return ()
        return self.problem.experts[self.expert_index].token_ids[: self.prefix_len]

    @property
    def start_len(self) -> int:
        """Tokens before the first sampled one: prompt and prefix."""
        return len(self.problem.prompt_ids) + self.prefix_len


class FinishReason(enum.StrEnum):
    STOP = "stop"  # the model sampled EOS
    LENGTH = "length"  # prefix + completion reached max_completion_length
    NOT_SAMPLED = "not_sampled"  # the whole expert solution is the row
    UNFINISHED = "unfinished"  # taken back from the engine; `resume` goes on with it


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
      temperature: >= 0; 0 is greedy.
      top_p: in (0, 1]; only the most likely tokens whose probabilities reach it. For evaluation.
      top_k: >= 0; only so many of the most likely tokens, 0 for all. For evaluation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the engine returns for a request: the sampled tokens, EOS included, and the
    log-probability of each under the temperature-scaled distribution it was drawn from."""

    request: RolloutRequest
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def __post_init__(self):
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens, but {len(self.logprobs)} logprobs")


class SamplingProgress(NamedTuple):
    """What a process has sampled and graded since its previous report.

    Attributes:
      phase: what it does next: "prefilling", "sampling", or "grading" if nothing is left to sample.
      num_graded: number of completions that were graded.
      num_sampled_tokens: number of tokens that were sampled.
      num_prefilled_tokens: number of prompt and prefix tokens that were prefilled.
    """

    phase: str
    num_graded: int
    num_sampled_tokens: int
    num_prefilled_tokens: int


class Verdict(enum.StrEnum):
    """What a reward function may return instead of a number. ERROR and TIMEOUT are missing rewards."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"
    TIMEOUT = "timeout"


class Judgment(NamedTuple):
    """What one reward function says about a response.

    Attributes:
      reward: in [0, 1]; None if it is missing, because the function failed or exceeded its time limit.
      answer: the answer that the function read from the response, if it reads one.
      reason: why the reward is missing: "timeout", or the name of an exception.
    """

    reward: float | None
    answer: str | None = None
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """The judgment as a verdict; only the full reward is CORRECT."""
        if self.reward is not None:
            return Verdict.CORRECT if self.reward == 1.0 else Verdict.WRONG
        return Verdict.TIMEOUT if self.reason == Verdict.TIMEOUT else Verdict.ERROR


@dataclasses.dataclass(frozen=True)
class Grade:
    """The judgments of all reward functions on a response and the reward that follows from them.

    Attributes:
      reward: the reward in [0, 1]; None if it is missing, so that the rollout enters no mean and no gradient.
      judgments: by name of the reward function. The first one decides whether the response is correct.
    """

    reward: float | None
    judgments: Mapping[str, Judgment]

    @property
    def is_correct(self) -> bool:
        """Whether the first reward function gives the full reward."""
        first = next(iter(self.judgments.values()), None)  # None if the problem has no answer
        return first is not None and first.reward == 1.0

    @property
    def answer(self) -> str | None:
        """The answer that was read from the response by the first function that reads one."""
        answers = (judgment.answer for judgment in self.judgments.values())
        return next((answer for answer in answers if answer is not None), None)

    @property
    def missing(self) -> dict[str, str]:
        """Why rewards are missing, by name of the reward function."""
        return {name: j.reason for name, j in self.judgments.items() if j.reward is None}

    def as_record(self) -> dict[str, Any]:
        """Returns the fields that records of samples have in common: `answer` (what was read from the response),
        `is_correct`, `reward`, `rewards` (by reward function), and `missing` (why a reward is null)."""
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
          ValueError: if it is missing; such rollouts are removed before anything is computed from rewards.
        """
        if self.grade.reward is None:
            raise ValueError(f"the reward of rollout {self.request.key} is missing")
        return self.grade.reward


class Moment(NamedTuple):
    """When a step happens.

    Attributes:
      step: 1 at the first.
      progress: share of the run that was over before the step, in [0, 1).
      seed: of the run.
    """

    step: int
    progress: float
    seed: int


class TrainRow(NamedTuple):
    """A rollout, or an expert solution alone, as it is trained.

    Attributes:
      completion: prompt, expert prefix and sampled tokens, if any.
      advantage: advantage of the trained tokens.
      trains_expert: whether the expert prefix is trained; otherwise it is context.
      rollout: key of the rollout of the current step that the row trains; None for an expert solution alone.
    """

    completion: Completion
    advantage: float
    trains_expert: bool
    rollout: tuple[str, int] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt, prefix and completion."""
        return self.completion.request.start_len + self.num_completion

    @property
    def num_completion(self) -> int:
        """Sampled tokens."""
        return len(self.completion.token_ids)

    @property
    def num_expert_trained(self) -> int:
        return self.completion.request.prefix_len if self.trains_expert else 0

    @property
    def num_trained(self) -> int:
        """Tokens with a loss."""
        return self.num_completion + self.num_expert_trained


@dataclasses.dataclass(frozen=True)
class Usage:
    """What has been spent, counted exactly; the sum over a run's steps is part of its checkpoints.

    Attributes:
      tokens_trained: completion and expert tokens with a loss, once per optimizer step on them.
      tokens_expert_trained: the expert tokens among them.
      tokens_prompt: prompt tokens of the rows that were trained, once per optimizer step on them.
      tokens_sampled: tokens sampled by the policy, trained or not.
      problems_seen: number of problems whose rollouts were sampled.
      flops: FLOPs of sampling and training, counted by formula (`models.flops`).
      seconds: time spent on sampling, grading and training.
    """

    tokens_trained: int = 0
    tokens_expert_trained: int = 0
    tokens_prompt: int = 0
    tokens_sampled: int = 0
    problems_seen: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        names = [field.name for field in dataclasses.fields(self)]
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in names})


class TokenKind(enum.IntEnum):
    """What a token of a training row is; every mask derives from it."""

    PAD = 0
    PROMPT = 1
    EXPERT = 2  # expert prefix, context only: another row of the group trains it
    EXPERT_TRAINED = 3
    COMPLETION = 4


class TrainBatch(NamedTuple):
    """One optimiser batch. Arrays are `[M, B, T]`: micro-batches, rows, tokens; global sizes.

    A row holds one or several rollouts one after the other, each a segment. `kinds[..., t]`,
    `advantages[..., t]` and `sampler_logprobs[..., t]` belong to the token `token_ids[..., t]`,
    which the position t - 1 of the same segment predicts. M is as large as it can ever be, so that
    shapes stay the same; the micro-batches from `num_micro_batches` on are all pad.
    """

    token_ids: Any  # int32
    positions: Any  # int32, 0 at a segment's first token
    segment_ids: Any  # int32, 0 in the pad, else 1 + the rollout's number in the batch
    kinds: Any  # int8, TokenKind
    advantages: Any  # float32, the rollout's advantage on what is trained of it, else 0
    sampler_logprobs: Any  # float32, on the completion, else 0
    num_rollouts: Any  # float32 [], rollouts in the whole batch
    num_micro_batches: Any  # int32 [], micro-batches that hold any
    # float32 on what is trained, else 0; None where no loss asks for them
    old_logprobs: Any = None  # under the policy before the batch's first update; None: of this one
    ref_logprobs: Any = None  # under the model the run began with


class UpdateTrace(NamedTuple):
    """What one update computed at every trained token.

    Attributes:
      rows: the rows of the update.
      batch: the batch on the host, in which `rows[i]` is segment 1 + i.
      trace: device arrays float32 `[M, B, T]`, aligned with the batch: log-probabilities and |d objective / d logprob|.
    """

    rows: Any
    batch: TrainBatch
    trace: tuple[Any, Any]
