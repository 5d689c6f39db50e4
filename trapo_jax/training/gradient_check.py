"""Checks that the gradient of a batch does not depend on how the batch is split or on an earlier stage of the run.

Published baselines were handicapped by train steps that dropped the gradients of all micro-batches but one, or that
averaged micro-batch means (arXiv 2604.23747). Two-stage baselines are handicapped if the second stage begins
with the moments that the optimizer accumulated in the first.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from trapo_jax.config import Config
from trapo_jax.distributed.sharding import make_mesh, num_batch_shards
from trapo_jax.methods import Method, Sampled, Update
from trapo_jax.models import PretrainedModel
from trapo_jax.training.learner import Learner
from trapo_jax.training.packing import build_batch
from trapo_jax.training.train_step import place_batch
from trapo_jax.types import (
    Completion,
    FinishReason,
    Grade,
    Judgment,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
    StagePosition,
    TrainBatch,
    TrainingFailed,
    UserError,
)

ROW_LEN_MULTIPLE = 128  # required by some attention kernels
# Progress of the run at which the gradient is checked; a method's objective may change during the run.
START, END = 0.0, 0.99
TOLERANCE = 1e-4  # relative to the gradient norm; float32 rounding errors are well below it


class BrokenTrainStep(TrainingFailed):
    """The gradient depends on how a batch is split into micro-batches, or a stage inherits the previous stage's optimizer."""


def check_gradient(
    config: Config, method: Method, model: PretrainedModel, problems: Sequence[Problem]
) -> float:
    """Compares the gradients of synthetic rollouts, computed in a single micro-batch and in one micro-batch per row.

    Args:
      config: the run's config.
      method: the run's method.
      model: the run's model.
      problems: problems to build rollouts from; at least two must have an expert solution.

    Returns:
      The largest relative difference between the two gradients.

    Raises:
      BrokenTrainStep: if the difference exceeds rounding error, if a gradient is zero (which makes the comparison
        meaningless), or if a stage of the method inherits the previous stage's optimizer state.
      UserError: if there are not enough expert solutions.
    """
    axes = config.mesh
    learner = Learner(
        config,
        method,
        dataclasses.replace(model.decoder, dtype="float32"),
        make_mesh(fsdp=axes.fsdp, tp=axes.tp),
        optimizer=optax.chain(optax.trace(decay=0.5), optax.scale(0.0)),  # sums gradients
    )
    learner.load(model, seed=config.seed)
    max_completion_len = config.sampling.completion_len
    chosen = pick_test_problems(problems, max_completion_len)
    largest = 0.0
    previous: tuple[Moment, Update] | None = None
    for moment, update in synthetic_updates(method, chosen, config.seed, max_completion_len):
        gradients = []
        for num_rows in (len(update.rows), 1):
            batch = cut_batch(update, num_rows, learner, max_row_len=config.row_len)
            gradients.append(_gradient(learner, batch, moment))
        largest = max(largest, compare_gradients(gradients[0], gradients[1], method.name))
        if previous and previous[0].stage.index < moment.stage.index:
            check_new_stage(learner, previous, (moment, update), gradients[0])
        previous = moment, update
    return largest


def pick_test_problems(problems: Sequence[Problem], max_completion_len: int) -> list[Problem]:
    """Picks the problem with the shortest expert solution and the problem with the next longer solution.

    If all rows had the same length, averaging micro-batch means would give the correct gradient, and the check could
    not detect this mistake.

    Raises:
      UserError: if fewer than two problems have an expert solution of at most `max_completion_len` tokens.
    """
    length = lambda problem: len(problem.experts[0].token_ids)
    candidates = sorted(
        (p for p in problems if p.experts and length(p) <= max_completion_len), key=length
    )
    if len(candidates) < 2:
        raise UserError(
            "data: the gradient check needs two training problems with an expert solution of at most "
            f"sampling.max_completion_length={max_completion_len} tokens"
        )
    first = candidates[0]
    return [first, next((p for p in candidates if length(p) > length(first)), candidates[1])]


def cut_batch(update: Update, num_rows: int, learner: Learner, *, max_row_len: int) -> TrainBatch:
    """Splits the rows of an update into micro-batches and places them on the devices.

    Args:
      update: the update.
      num_rows: rows per micro-batch; rounded up to a multiple of the number of batch shards.
      learner: the learner whose train step receives the batch.
      max_row_len: maximum row length that the config allows.
    """
    num_shards = num_batch_shards(learner.mesh)
    longest = max(row.length for row in update.rows)
    batch = build_batch(
        update.rows,
        row_len=min(max_row_len, -(-longest // ROW_LEN_MULTIPLE) * ROW_LEN_MULTIPLE),
        micro_batch_rows=-(-num_rows // num_shards) * num_shards,
        num_shards=num_shards,
        packed=False,
    )
    # For losses that need a reference policy, any policy other than the current one will do.
    batch = batch._replace(ref_logprobs=batch.sampler_logprobs)
    return place_batch(batch, learner.mesh)


def compare_gradients(whole: Any, cut: Any, name: str) -> float:
    """Returns the norm of the difference between two gradients, divided by the norm of the first, over all leaves.

    Args:
      whole: gradient computed in one micro-batch.
      cut: gradient computed in several micro-batches.
      name: name of the method, for the error message.

    Raises:
      BrokenTrainStep: if the gradient is zero or not finite, or if the relative difference exceeds `TOLERANCE`.
    """
    norm = _norm(whole)
    if not norm > 0 or not np.isfinite(norm):
        raise BrokenTrainStep(
            f"{name}: the gradient of the checked batch has norm {norm:g}; expected a finite norm > 0"
        )
    difference = _norm(jax.tree.map(np.subtract, whole, cut)) / norm
    if not difference <= TOLERANCE:
        raise BrokenTrainStep(
            f"{name}: the gradient of a batch changes by {difference:.2g} of its norm if the batch is split into "
            "micro-batches; comparing methods with this train step would be meaningless"
        )
    return difference


def check_new_stage(
    learner: Learner, last: tuple[Moment, Update], first: tuple[Moment, Update], gradient: Any
) -> None:
    """Checks that the first update of a stage does not depend on the last update of the previous stage.

    Args:
      learner: a learner whose optimizer sums gradients.
      last: the last update before the stage.
      first: the first update of the stage.
      gradient: the gradient of the first update.

    Raises:
      BrokenTrainStep: if the optimizer's sum of gradients contains more than the first update's gradient.
    """
    for moment, update in (last, first):
        learner.update([update._replace(max_grad_norm=np.inf)], moment)
    num_iterations = learner.num_iterations
    weight = sum(0.5**i for i in range(num_iterations))
    expected = jax.tree.map(lambda x: weight * x, gradient)
    difference = _norm(jax.tree.map(np.subtract, _sum_of_gradients(learner), expected))
    if not difference <= TOLERANCE * _norm(expected):
        raise BrokenTrainStep(
            f"{learner.method.name}: stage {learner.method.stages[first[0].stage.index].name} begins with the "
            "previous stage's optimizer state; comparing methods with this train step would be meaningless"
        )


def synthetic_updates(
    method: Method, problems: Sequence[Problem], seed: int, max_completion_len: int
) -> Iterator[tuple[Moment, Update]]:
    """Yields the method's updates early and late in each stage, for rollouts in which all micro-groups are guided.

    All rollouts of the first problem are wrong. For each of the other problems, every second rollout is correct.
    """
    rng = np.random.default_rng(0)
    for index, progress in itertools.product(range(len(method.stages)), (START, END)):
        moment = Moment(1, progress, seed, StagePosition(index, 1, progress))
        groups = []
        for i, problem in enumerate(problems):
            micro_groups = method.micro_groups_at(moment, problem)
            ratios = [group.ratio for group in micro_groups for _ in range(group.size)]
            groups.append(
                [
                    _synthetic_rollout(rng, problem, j, ratio, is_correct=i > 0 and j % 2 == 0)
                    for j, ratio in enumerate(ratios)
                ]
            )
        sampled = Sampled(
            groups=groups,
            moment=moment,
            state={},
            extra_problems=problems,
            problems={p.id: p for p in problems},
            max_completion_length=max_completion_len,
        )
        for update in method.select(sampled).updates:
            yield moment, update


def _gradient(learner: Learner, batch: TrainBatch, moment: Moment) -> Any:
    learner.reset_optimizer()
    coefficients = learner.method.coefficients(moment, learning_rate=1.0)
    learner.state, *_ = learner.train_step(learner.state, batch, coefficients)
    return _sum_of_gradients(learner)


def _sum_of_gradients(learner: Learner) -> Any:
    return jax.device_get(learner.state.opt_state[0].trace)


def _synthetic_rollout(
    rng: np.random.Generator, problem: Problem, index: int, ratio: float, *, is_correct: bool
) -> Rollout:
    """Returns a rollout with an expert prefix and a completion that is a random sample of the solution's tokens."""
    solution = np.array(problem.experts[0].token_ids)
    prefix_len = int(ratio * len(solution))
    request = RolloutRequest(problem, index, 0, 0 if prefix_len else -1, prefix_len, ratio)
    tokens = rng.permutation(solution)[: len(solution) - prefix_len]
    tokens = tokens[: rng.integers(1, len(tokens) + 1)] if len(tokens) else tokens
    completion = Completion(
        request,
        tuple(tokens.tolist()),
        tuple(rng.uniform(-2, 0, len(tokens)).tolist()),
        FinishReason.STOP if len(tokens) else FinishReason.NOT_SAMPLED,
    )
    reward = float(is_correct)
    return Rollout(completion, Grade(reward, {"random": Judgment(reward)}))


def _norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(tree))))
