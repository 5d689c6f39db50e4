"""Defines the data types shared by all packages: problems, rollout requests, rollouts, and training batches.

Every package may import this module, and this module imports none of them.
"""

import dataclasses
import enum
import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

BATCH_AXES = ("data", "fsdp")  # mesh axes that shard the rows of a batch
MAX_ERROR_CHARS = 2000  # maximum length of a line in an error message
TENSOR_AXIS = "tp"  # mesh axis that shards heads, MLPs and the vocabulary


# Where an expert prefix may end: at any token, or only at the end of a paragraph.
PrefixBoundary = Literal["exact", "paragraph"]
# The part of an expert solution to train on: the text inside `<think>...</think>` if present, or the whole solution.
ExpertPart = Literal["thought", "whole"]


class UserError(Exception):
    """An error that the user can fix. Commands print it without a traceback, and exit with code 2.

    Args:
      lines: one line per mistake, usually just one. Because they may quote data, line breaks in them are escaped, and
        the middle of a very long line is omitted.
    """

    def __init__(self, *lines: str):
        half = MAX_ERROR_CHARS // 2
        short = (x if len(x) <= 2 * half else f"{x[:half]} ... {x[-half:]}" for x in lines)
        self.lines = [line.replace("\n", "\\n") for line in short]
        super().__init__("\n".join(self.lines))


EXIT_FAILED = 1  # exit code of a process that raised `TrainingFailed`, or ended because another process failed


class TrainingFailed(Exception):
    """Training cannot continue. Committed checkpoints are kept. Commands exit with code `EXIT_FAILED`."""


class Interrupted(Exception):
    """A signal asked the process to stop. Saved data is kept, and the same command resumes the run."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert solution of a problem, tokenized for the policy.

    Attributes:
      token_ids: the solution with EOS appended.
      paragraph_ends: lengths, in ascending order, of the prefixes whose last token contains or completes a blank line.
    """

    token_ids: tuple[int, ...]
    paragraph_ends: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One training or evaluation problem.

    Attributes:
      id: 16 hexadecimal digits derived from the content; problems with equal content have equal ids.
      prompt_ids: token ids of the prompt, with the chat template applied.
      answer: the reference answer for the grader.
      experts: zero or more expert solutions, in order of preference.
      prompt_text: the prompt as readable text.
      source: name used to group results, such as a data source or a difficulty.
      columns: other columns of the dataset row, for reward functions; JSON-serializable.
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
        """The first 32 bits of the id, for deriving random keys."""
        return int(self.id[:8], 16)


def find_by_source(by_source: Mapping[str, T], source: str) -> T | None:
    """Returns the value of the first `fnmatch` pattern that a problem's source matches, ignoring case; None if none does.

    >>> find_by_source({"aime*": 32}, "AIME24")
    32
    """
    for pattern, value in by_source.items():
        if fnmatch.fnmatchcase(source.lower(), pattern.lower()):
            return value
    return None


@dataclasses.dataclass(frozen=True)
class MicroGroup:
    """A group of `size` rollouts. They start from an expert prefix of ratio `ratio` if the mean reward of all
    earlier rollouts of the problem is below `threshold`; otherwise, they are unguided."""

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
      top_p: in (0, 1]; samples only from the most likely tokens whose total probability reaches `top_p`. Used only
        in evaluation.
      top_k: >= 0; samples only from the `top_k` most likely tokens, or from all tokens if 0. Used only in evaluation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """The engine's result for a request: the sampled tokens, including EOS, and the log-probability
    of each token under the temperature-scaled distribution from which it was sampled."""

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
        """Returns the fields shared by all sample records: `answer` (extracted from the response), `is_correct`,
        `reward`, `rewards` (keyed by reward function), and `missing` (reasons for missing rewards)."""
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


@dataclasses.dataclass(frozen=True)
class StagePosition:
    """The position of a step within a stage of the run.

    Attributes:
      index: index of the stage, starting at 0.
      step: number of the step within the stage, starting at 1.
      progress: fraction of the stage completed before the step, in [0, 1].
    """

    index: int
    step: int
    progress: float


class Moment(NamedTuple):
    """The position of a step within a run.

    Attributes:
      step: number of the step, starting at 1.
      progress: fraction of the run completed before the step, in [0, 1).
      seed: seed of the run.
      stage: position within the method's current stage; most methods have a single stage.
    """

    step: int
    progress: float
    seed: int
    stage: StagePosition = StagePosition(0, 1, 0.0)


class TrainRow(NamedTuple):
    """A rollout or an expert solution to train on.

    Attributes:
      completion: prompt, expert prefix and sampled tokens, if any.
      advantage: advantage of the trained tokens.
      trains_expert: whether the expert prefix is trained; otherwise, it is only context.
      rollout: key of the current step's rollout that the row trains on; None for an expert solution without a rollout.
    """

    completion: Completion
    advantage: float
    trains_expert: bool
    rollout: tuple[str, int] | None = None

    @property
    def length(self) -> int:
        """The number of tokens in the prompt, the prefix and the completion."""
        return self.completion.request.start_len + self.num_completion

    @property
    def num_completion(self) -> int:
        """The number of sampled tokens."""
        return len(self.completion.token_ids)

    @property
    def num_expert_trained(self) -> int:
        return self.completion.request.prefix_len if self.trains_expert else 0

    @property
    def num_trained(self) -> int:
        """The number of tokens with a loss."""
        return self.num_completion + self.num_expert_trained


@dataclasses.dataclass(frozen=True)
class Usage:
    """Exact counts of the resources used. Checkpoints contain the totals over all steps of the run so far.

    Attributes:
      tokens_trained: number of completion and expert tokens with a loss, counted once per optimizer step.
      tokens_expert_trained: number of expert tokens among the trained tokens.
      tokens_prompt: number of prompt tokens in trained rows, counted once per optimizer step.
      tokens_sampled: number of tokens sampled by the policy, trained or not.
      problems_seen: number of problems whose rollouts were sampled.
      flops: FLOPs of sampling and training, computed analytically (`models.flops`).
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
    """The role of a token in a training row. All masks are derived from it."""

    PAD = 0
    PROMPT = 1
    EXPERT = 2  # expert prefix used only as context; another row of the group trains on it
    EXPERT_TRAINED = 3
    COMPLETION = 4


class TrainBatch(NamedTuple):
    """One optimizer batch. Arrays have the global shape `[M, B, T]`: micro-batches, rows, tokens.

    A row contains one or more rollouts, packed as consecutive segments. `kinds[..., t]`,
    `advantages[..., t]` and `sampler_logprobs[..., t]` describe the token `token_ids[..., t]`,
    which is predicted at position t - 1 of the same segment. M is the maximum number of
    micro-batches, so that shapes never change; micro-batches from index `num_micro_batches` onward
    contain only padding.
    """

    token_ids: Any  # int32
    positions: Any  # int32, 0 at the first token of a segment
    segment_ids: Any  # int32, 0 for padding, otherwise 1 + index of the rollout in the batch
    kinds: Any  # int8, TokenKind
    advantages: Any  # float32, the rollout's advantage at trained tokens, otherwise 0
    sampler_logprobs: Any  # float32 at completion tokens, otherwise 0
    num_rollouts: Any  # float32 [], number of rollouts in the whole batch
    num_micro_batches: Any  # int32 [], number of nonempty micro-batches
    # Log-probabilities, float32 at trained tokens, otherwise 0; None if no loss needs them.
    old_logprobs: Any = (
        None  # under the policy before the batch's first update; None in that update
    )
    ref_logprobs: Any = None  # under the run's initial model


class UpdateTrace(NamedTuple):
    """Per-token values from one update, for all trained tokens.

    Attributes:
      rows: the rows of the update.
      batch: the batch on the host; `rows[i]` is segment 1 + i.
      trace: float32 device arrays `[M, B, T]`, aligned with the batch: log-probabilities and |d objective / d logprob|.
    """

    rows: Any
    batch: TrainBatch
    trace: tuple[Any, Any]
