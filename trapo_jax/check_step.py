"""Checks the train step of runs: the gradient of a batch must not depend on how the batch is cut into micro-batches.

    python -m trapo_jax.check_step CONFIG.yaml ...

Published baselines have been handicapped by steps that dropped the gradients of all micro-batches but one, or took the
mean of micro-batch means (arXiv 2604.23747). `trapo_jax.compare` begins with this, on the model and the
problems of its runs, for every method that it compares.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from trapo_jax.config import Config, load_config
from trapo_jax.data.splits import load_splits
from trapo_jax.distributed.sharding import make_mesh, num_batch_shards
from trapo_jax.methods import Method, Sampled, Update
from trapo_jax.models import abstract_params, find_model, load_params, load_tokenizer
from trapo_jax.parts import build_decoder, build_method, build_train_step
from trapo_jax.runs.command_line import EXIT_USER_ERROR, as_command, fail
from trapo_jax.training.packing import build_batch
from trapo_jax.training.state import init_state, state_shardings
from trapo_jax.training.train_step import place_batch
from trapo_jax.types import (
    Completion,
    FinishReason,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
    TrainBatch,
    UserError,
    Verdict,
)

EXIT_BROKEN = 1
ROW_MULTIPLE = 128  # as some attention kernels want it
STAGES = (0.0, 0.99)  # a method may do one thing at the start of a run and another at the end
TOLERANCE = 1e-4  # of the gradient's norm; the differences are float32's


class BrokenStep(Exception):
    """The gradient of a batch depends on how it is cut."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.check_step", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="of runs")
    args = parser.parse_args(arguments)
    try:
        found = {str(file): check_step(load_config(Config, file, [])) for file in args.configs}
    except BrokenStep as error:
        return fail(str(error), EXIT_BROKEN)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    print(json.dumps({"device": jax.default_backend(), "largest_differences": found}))
    return 0


def check_step(config: Config) -> float:
    """Computes gradients of made-up rollouts in one micro-batch, and in as many as there are rows.

    Returns:
      The largest difference found, as a share of the gradient's norm.

    Raises:
      BrokenStep: if it is more than rounding, or a gradient is zero, which would be equal however it is cut.
    """
    folder = find_model(config.model.path)
    decoder = dataclasses.replace(build_decoder(config, folder), dtype="float32")
    method = build_method(config)
    mesh = make_mesh(fsdp=config.mesh.fsdp, tp=config.mesh.tp)
    # Keeps the gradient, and updates nothing.
    optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(0.0))
    shardings = state_shardings(abstract_params(decoder), optimizer, mesh)
    step = build_train_step(config, decoder, method, optimizer, mesh, shardings)
    state = init_state(load_params(folder, decoder, shardings.params), optimizer, mesh)
    splits, _ = load_splits(config.data, load_tokenizer(folder))
    problems = two_short_ones(splits["train"], config.sampling.max_completion_length)
    largest = 0.0
    for moment, update in made_up_updates(config, method, problems):
        coefficients = method.coefficients(moment, learning_rate=1.0)
        gradients = []
        for num_rows in (len(update.rows), 1):
            batch = cut_into(update, num_rows, config, mesh)
            state, *_ = step(state, batch, coefficients)
            gradients.append(jax.device_get(state.opt_state[0].trace))
        largest = max(largest, compare_gradients(gradients[0], gradients[1], method.name))
    return largest


def two_short_ones(problems: Sequence[Problem], max_completion_length: int) -> list[Problem]:
    """The problem with the shortest expert and the next one whose length differs: a mean of means of equally long
    rows would be right.

    Raises:
      UserError: if there are no experts to make rollouts of.
    """
    length = lambda problem: len(problem.experts[0].token_ids)
    fit = sorted(
        (p for p in problems if p.experts and length(p) <= max_completion_length), key=length
    )
    if len(fit) < 2:
        raise UserError(
            "data: no two training problems have an expert solution of at most "
            f"sampling.max_completion_length={max_completion_length} tokens to check the train step with"
        )
    return [fit[0], next((p for p in fit if length(p) > length(fit[0])), fit[1])]


def cut_into(update: Update, num_rows: int, config: Config, mesh: Mesh) -> TrainBatch:
    """The update's rows in micro-batches of so many, or of the next number that the devices can share."""
    num_shards = num_batch_shards(mesh)
    longest = max(row.length for row in update.rows)
    batch = build_batch(
        update.rows,
        row_len=min(config.row_len, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE),
        micro_batch_rows=-(-num_rows // num_shards) * num_shards,
        num_shards=num_shards,
        packed=False,
    )
    # Some other policy's, for the losses that ask for one.
    return place_batch(batch._replace(ref_logprobs=batch.sampler_logprobs), mesh)


def compare_gradients(whole: Any, cut: Any, name: str) -> float:
    """The norm of the difference as a share of the norm of the first, over all leaves.

    Raises:
      BrokenStep: naming the method and what is wrong.
    """
    norm = _norm(whole)
    if not norm > 0 or not np.isfinite(norm):
        raise BrokenStep(f"{name}: the gradient of the checked batch has norm {norm:g}")
    difference = _norm(jax.tree.map(np.subtract, whole, cut)) / norm
    if not difference <= TOLERANCE:
        raise BrokenStep(
            f"{name}: the gradient of a batch cut into micro-batches differs from that of the whole by "
            f"{difference:.2g} of its norm; a comparison with such a step is worth nothing"
        )
    return difference


def made_up_updates(
    config: Config, method: Method, problems: Sequence[Problem]
) -> Iterator[tuple[Moment, Update]]:
    """What the method trains, early and late in a run, of rollouts in which all of its guidance is used; no
    rollout of the first problem is right, every other one of the rest."""
    rng = np.random.default_rng(0)
    for stage in STAGES:
        moment = Moment(1, stage, config.seed)
        groups = []
        for i, problem in enumerate(problems):
            micro_groups = method.micro_groups_at(moment, problem)
            ratios = [group.ratio for group in micro_groups for _ in range(group.size)]
            groups.append(
                [
                    _made_up_rollout(rng, problem, j, ratio, right=i > 0 and j % 2 == 0)
                    for j, ratio in enumerate(ratios)
                ]
            )
        sampled = Sampled(
            groups=groups,
            moment=moment,
            state={},
            extra_problems=problems,
            problems={p.id: p for p in problems},
            max_completion_length=config.sampling.max_completion_length,
        )
        for update in method.select(sampled).updates:
            yield moment, update


def _made_up_rollout(
    rng: np.random.Generator, problem: Problem, index: int, ratio: float, *, right: bool
) -> Rollout:
    """A prefix of the expert's solution, and some of its tokens in any order."""
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
    return Rollout(completion, Verdict.CORRECT if right else Verdict.WRONG, float(right))


def _norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(tree))))


if __name__ == "__main__":
    as_command(main)
