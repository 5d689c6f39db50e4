"""Defines the data types shared by all packages: errors, problems, rollouts, and training batches.

Every other package may import this one; this one imports no other package.
"""

from trapo_jax.types.errors import EXIT_FAILED, Interrupted, TrainingFailed, UserError
from trapo_jax.types.problems import Expert, ExpertPart, PrefixBoundary, Problem, find_by_source
from trapo_jax.types.rollouts import (
    Completion,
    FinishReason,
    Grade,
    Judgment,
    MicroGroup,
    Rollout,
    RolloutRequest,
    SamplingParams,
    SamplingProgress,
    Verdict,
)
from trapo_jax.types.training import (
    BATCH_AXES,
    TENSOR_AXIS,
    Moment,
    StagePosition,
    TokenKind,
    TrainBatch,
    TrainRow,
    UpdateTrace,
    Usage,
)

__all__ = [
    "BATCH_AXES",
    "EXIT_FAILED",
    "TENSOR_AXIS",
    "Completion",
    "Expert",
    "ExpertPart",
    "FinishReason",
    "Grade",
    "Interrupted",
    "Judgment",
    "MicroGroup",
    "Moment",
    "PrefixBoundary",
    "Problem",
    "Rollout",
    "RolloutRequest",
    "SamplingParams",
    "SamplingProgress",
    "StagePosition",
    "TokenKind",
    "TrainBatch",
    "TrainRow",
    "TrainingFailed",
    "UpdateTrace",
    "Usage",
    "UserError",
    "Verdict",
    "find_by_source",
]
