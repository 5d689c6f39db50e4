"""Defines training batches, and positions within a run."""

import dataclasses
import enum
from typing import Any, NamedTuple

from trapo_jax.types.rollouts import Completion

BATCH_AXES = ("data", "fsdp")  # mesh axes over which the rows of a batch are sharded


TENSOR_AXIS = "tp"  # mesh axis over which heads, MLPs and the vocabulary are sharded


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
      tokens_prompt: number of prompt tokens of the trained rollouts, counted once per rollout and optimizer step.
      tokens_sampled: number of tokens sampled by the policy, trained or not.
      problems_seen: number of problems whose rollouts were sampled.
      flops: FLOPs of sampling and training, computed analytically (`models.flops`) as if no prompts were shared.
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
    """The role of a token in a training row. All masks are derived from this role."""

    PAD = 0
    PROMPT = 1
    EXPERT = 2  # expert prefix that this row uses only as context
    EXPERT_TRAINED = 3
    COMPLETION = 4


class TrainBatch(NamedTuple):
    """One optimizer batch. Arrays have the global shape `[M, B, T]`: micro-batches, rows, tokens.

    A row contains one or more rollouts, packed as consecutive segments. `kinds[..., t]`, `advantages[..., t]` and
    `sampler_logprobs[..., t]` describe the token `token_ids[..., t]`, which is predicted at position t - 1 of the same
    segment. M is the maximum number of micro-batches, so that shapes never change; micro-batches from index
    `num_micro_batches` onward contain only padding.
    """

    token_ids: Any  # int32
    positions: Any  # int32, positions of the tokens in their rollouts
    segment_ids: Any  # int32, 0 for padding, otherwise 1 + index of the rollout in the batch
    kinds: Any  # int8, TokenKind
    advantages: Any  # float32, the rollout's advantage at trained tokens, otherwise 0
    sampler_logprobs: Any  # float32 at completion tokens, otherwise 0
    num_rollouts: Any  # float32 [], number of rollouts in the whole batch
    num_micro_batches: Any  # int32 [], number of nonempty micro-batches
    # Log-probabilities, float32 at trained tokens, otherwise 0; None if no loss needs them.
    old_logprobs: Any = (
        None  # under the policy before the batch's first update; None during that update
    )
    ref_logprobs: Any = None  # under the run's initial model
    # int32, the segment that a token attends to besides its own: the prompt that its rollout shares with others, whose
    # own id is larger than those of all rollouts. Equals segment_ids elsewhere; None if no prompts are shared.
    context_ids: Any = None


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
