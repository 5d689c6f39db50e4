"""Tests every token's weight against numbers derived by hand from the formulas in the methods' released code.

The released code adds up the losses of micro-batches without dividing by their numbers of rows, whereas this package
divides by the number of rows in the whole batch. All weights here are multiplied by that number, so that both have the
same scale. Unless `micro_batch_rows` is given, the expected weights assume that the released code would process the
batch as a single micro-batch.
"""

import numpy as np
import pytest

from support.grades import grade_of
from support.objective import objective
from trapo_jax.methods import Sampled, make_method
from trapo_jax.training.packing import build_batch
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Moment,
    Problem,
    Rollout,
    RolloutRequest,
    TokenKind,
)

LENGTH = 10  # maximum response length L
P, H = 0.3, 0.7  # probability and entropy of every token
COMPLETION_LEN, EXPERT_LEN = 4, 5
MOMENT = Moment(step=100, progress=0.5, seed=0)


def group(name, rewards, *, prefix_len=0, with_expert=False):
    """Returns rollouts of one problem with the given rewards. If `with_expert`, the last is the expert solution."""
    problem = Problem(name * 16, (1, 2), "", (Expert(tuple(range(3, 3 + EXPERT_LEN))),))
    rollouts = []
    for j, reward in enumerate(rewards):
        is_expert = with_expert and j == len(rewards) - 1
        num_prefix, count = (EXPERT_LEN, 0) if is_expert else (prefix_len, COMPLETION_LEN)
        request = RolloutRequest(problem, j, 0, 0 if num_prefix else -1, num_prefix)
        reason = FinishReason.NOT_SAMPLED if is_expert else FinishReason.STOP
        completion = Completion(request, (9,) * count, (np.log(P),) * count, reason)
        rollouts.append(Rollout(completion, grade_of(float(reward))))
    return rollouts


def token_weights(method, groups, extra=()):
    """Returns the derivatives of the objective with respect to log-probabilities, multiplied by the number of rows.

    Each row has a pair of derivatives: one for its completion tokens and one for its expert tokens.
    """
    problems = {g[0].request.problem.id: g[0].request.problem for g in groups}
    sampled = Sampled(groups, MOMENT, {}, extra, problems, LENGTH)
    weights = []
    for update in method.select(sampled).updates:
        rows = update.rows
        batch = build_batch(rows, row_len=12, micro_batch_rows=len(rows), packed=False)
        now, entropies = (np.full(batch.kinds.shape, x, np.float32) for x in (np.log(P), H))
        _, (gradient, _) = objective(method, batch, (now, now, now, entropies), MOMENT, LENGTH)
        by_token = len(rows) * np.asarray(gradient[0])
        kinds, segments = batch.kinds[0, :, 1:], batch.segment_ids[0, :, 1:]
        for i in range(len(rows)):
            row = []
            for kind in (TokenKind.COMPLETION, TokenKind.EXPERT_TRAINED):
                values = by_token[(segments == 1 + i) & (kinds == kind)]
                row.append(float(values[0]) if len(values) else 0.0)
                np.testing.assert_allclose(values, row[-1])
            weights.append(tuple(row))
        assert not by_token[kinds <= TokenKind.EXPERT].any()
    return weights


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_luffy():
    """`mix_core_alg.py` uses sum(-A rho) / L on completions and sum(-A p / (p + 0.1)) / L on the expert solution."""
    method = make_method("luffy", num_rollouts=3)
    # The baseline is 2 / 4. The derivative of p / (p + 0.1) with respect to log p is 0.1 p / (p + 0.1)^2 = 0.1875.
    expected = [(-0.05, 0), (0.05, 0), (0.05, 0), (0, -0.5 * 0.1875 / 10)]
    check(token_weights(method, [group("1", [1, 0, 0, 1], with_expert=True)]), expected)


def test_rl_plus_sft():
    """`mix_actor.py` adds sum(-A rho) / L + mean(-log p) for each micro-batch; the baseline excludes the expert."""
    groups = [
        group("1", [1, 0, 0, 1], with_expert=True),
        group("2", [1, 1, 0, 1], with_expert=True),
    ]
    # The baselines are 1 / 3 and 2 / 3. Both micro-batches have four rows, with one expert solution of five tokens.
    method = make_method("rl_plus_sft", num_rollouts=3, micro_batch_rows=4)
    first = [(-2 / 30, 0), (1 / 30, 0), (1 / 30, 0), (0, -1 / 5)]
    second = [(-1 / 30, 0), (-1 / 30, 0), (2 / 30, 0), (0, -1 / 5)]
    check(token_weights(method, groups), [*first, *second])
    # In a single micro-batch of eight rows, the mean is over ten expert tokens.
    method = make_method("rl_plus_sft", num_rollouts=3, micro_batch_rows=8)
    check(token_weights(method, groups)[3], (0, -1 / 10))


def test_hpt():
    """In `mix_trainer.py`, an unsolved problem contributes only its expert solution, weighted as in RL + SFT."""
    groups = [group("1", [0, 0, 0, 0]), group("2", [1, 0, 0, 0])]
    method = make_method("hpt", num_rollouts=4, micro_batch_rows=5)
    expected = [(0, -1 / 5), (-0.75 / 10, 0), *[(0.25 / 10, 0)] * 3]
    check(token_weights(method, groups), expected)


def test_srft():
    """With `srft_type=paper`, `mix_core_alg.py` uses -0.1 e^H log p if r = 1, log p otherwise, and two expert terms."""
    method = make_method("srft", num_rollouts=3, micro_batch_rows=4)
    success = -0.1 * np.exp(0.7) / 10
    expert = -0.5 * np.exp(-0.7) / 5 - 0.5 * 0.1875 / 10  # the expert's advantage is 1 - 2 / 4
    expected = [(success, 0), (0.1, 0), (0.1, 0), (0, expert)]
    check(token_weights(method, [group("1", [1, 0, 0, 1], with_expert=True)]), expected)


def test_relift():
    """`actor.py` uses sum(-A rho) / L on all rollouts and, in a second update, the token mean over the buffer."""
    groups = [group("1", [0, 0]), group("2", [1, 0])]
    method = make_method("relift", num_rollouts=2, buffer_size=1)
    own = [(0, 0), (0, 0), (-0.05, 0), (0.05, 0)]
    check(token_weights(method, groups), [*own, (0, -1 / 5)])


def test_uft():
    """`dp_actor.py` adds 0.001 times the token mean over hints to PPO's token mean.

    Advantages are divided by the sample standard deviation, whose denominator is n - 1.
    """
    method = make_method("uft", num_rollouts=4)
    # The mean is 1 / 4, and the standard deviation is sqrt((9 + 3 * 1) / 16 / 3) = 0.5.
    # There are 16 completion tokens and 4 rows.
    expected = [(-1.5 * 4 / 16, -0.001 * 4 / 4), *[(0.5 * 4 / 16, 0)] * 3]
    check(token_weights(method, [group("1", [1, 0, 0, 0], prefix_len=4)]), expected)


def test_chord():
    """`chord_policy_loss.py` uses (1 - mu) times PPO's token mean plus mu times the expert batch's token mean."""
    method = make_method("chord", num_rollouts=2, expert_rows_per_rollout=1.0, mu_decay_steps=200)
    mu = (0.9 + 0.05) / 2  # at step 100 of 200
    extra = [g[0].request.problem for g in (group("3", [0]), group("4", [0]))]
    # The advantages are +-0.5 / sqrt(0.5). There are 8 completion tokens, 10 expert tokens, and 4 rows.
    own = (1 - mu) * np.sqrt(0.5) * 4 / 8
    expected = [(-own, 0), (own, 0), *[(0, -mu * 4 / 10)] * 2]
    check(token_weights(method, [group("1", [1, 0])], extra), expected)


@pytest.mark.parametrize(("p", "weight"), [(0.3, 1.0), (0.05, 0.5)])
def test_trapo(monkeypatch, p, weight):
    """With `clip_low`, `mix_core_alg.py` uses -p / max(sg p, 0.1) on prefixes and sum(-A rho) / L on completions.

    The whole group has one baseline.
    """
    monkeypatch.setitem(globals(), "P", p)
    rollouts = [*group("1", [1, 0]), *group("1", [1, 0], prefix_len=2)]
    # The prefix is trained on only once, so it adds no loss in the second rollout that has it.
    expected = [(-0.05, 0), (0.05, 0), (-0.05, -weight / 10), (0.05, 0)]
    check(token_weights(make_method("trapo"), [rollouts]), expected)
