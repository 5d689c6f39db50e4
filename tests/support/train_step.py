"""Provides a tiny decoder, groups of rollouts with different lengths, and train steps on such groups."""

import dataclasses
from typing import get_args

import jax
import numpy as np
import optax
from jax.sharding import AxisType

from support.grades import grade_of
from trapo_jax.methods import Normalizer, make_method
from trapo_jax.methods.selection import first_of_each_prefix, rows_of_group
from trapo_jax.models import DecoderConfig, Rope
from trapo_jax.training.packing import build_batch
from trapo_jax.training.state import init_state, state_shardings
from trapo_jax.training.train_step import TokenScorer, make_train_step
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
)

CONFIG = DecoderConfig(
    vocab_size=16,
    num_layers=2,
    width=16,
    mlp_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope=Rope(1e4),
    norm_epsilon=1e-6,
    tied_embeddings=True,
)
MAX_LENGTH = 12
ALPHA = 0.1
# With this seed, no prefix has two tokens with equal entropy, so rounding errors cannot change the order of tokens.
NO_TIES = 1


def ragged_groups(seed=0, num_problems=4):
    """Returns groups of eight rollouts with all kinds of prefixes and random rewards, and their advantages."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(num_problems):
        expert = Expert(tuple(rng.integers(2, 16, rng.integers(5, 11)).tolist()))
        prompt = tuple(rng.integers(2, 16, rng.integers(1, 6)).tolist())
        problem = Problem(f"{i:016x}", prompt, "", (expert,))
        group = []
        for j in range(8):
            prefix_len = int((0, 0, 0, 0, 2, 2, 4, len(expert.token_ids))[j])
            count = 0 if j == 7 else int(rng.integers(1, MAX_LENGTH - prefix_len))
            request = RolloutRequest(problem, j, 0, 0 if prefix_len else -1, prefix_len)
            completion = Completion(
                request,
                tuple(rng.integers(2, 16, count).tolist()),
                tuple(rng.normal(-1, 0.1, count).tolist()),
                FinishReason.STOP,
            )
            group.append(Rollout(completion, grade_of(float(rng.integers(0, 2)))))
        groups.append(group)
    advantages = [
        np.float32([r.reward for r in g]) - np.float32(np.mean([r.reward for r in g]))
        for g in groups
    ]
    return groups, advantages


def build(groups, advantages, **options):
    """Builds a batch; by default, all rollouts are in one micro-batch, with one rollout per row."""
    options = {"row_len": 20, "micro_batch_rows": 8 * len(groups), "packed": False, **options}
    rows = [
        row
        for group, values in zip(groups, advantages, strict=True)
        for row in rows_of_group(group, values, first_of_each_prefix(group))
    ]
    return build_batch(rows, **options)


def one_device_mesh():
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tp"), (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def coefficients(method):
    """Returns the coefficients for an optimizer that sets its own learning rate."""
    return method.coefficients(Moment(1, 0.0, 0), learning_rate=1.0)


def make_step(method, params, mesh, optimizer, config=CONFIG, **options):
    return make_train_step(
        TokenScorer(config, temperature=1.0, chunk_size=7),
        method,
        optimizer,
        mesh,
        state_shardings(params, optimizer, mesh),
        max_completion_length=MAX_LENGTH,
        **options,
    )


def sgd_step(method, batch, params, *, mesh=None, optimizer=None, config=CONFIG, **options):
    """Performs one step with a learning rate of 1 and no clipping, so that the update is the negative gradient."""
    mesh = mesh or one_device_mesh()
    optimizer = optimizer or optax.sgd(1.0)
    step = make_step(method, params, mesh, optimizer, config, **options)
    old = jax.device_get(params)
    state, metrics, _ = step(init_state(params, optimizer, mesh), batch, coefficients(method))
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), old, state.params)
    return gradient, jax.device_get(metrics), state


def relative_difference(a, b):
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def method_of_every_term():
    """Returns a method with both of TRAPO's terms for every normalizer, and with all loss terms of related methods."""
    methods = [make_method("trapo", normalizer=name) for name in get_args(Normalizer)]
    terms = tuple(
        dataclasses.replace(term, name=f"{term.name}/{term.normalizer}", weight=0.3 + 0.1 * i)
        for i, method in enumerate(methods)
        for term in method.terms
    )
    others = {
        term.name: term
        for name in ("luffy", "srft", "chord_phi", "prefix_rft", "relift")
        for term in make_method(name, entropy_weight=0.1).terms
    }
    terms += tuple(others.values())
    return dataclasses.replace(methods[0], terms=terms)
