"""Tests the resource usage and budgets of runs."""

import pytest

from support.grades import WRONG
from trapo_jax.methods.selection import first_of_each_prefix, rows_of_group
from trapo_jax.models import TokenCost
from trapo_jax.rollouts.metrics import rollout_usage
from trapo_jax.runs.budget import Budget
from trapo_jax.training.learner import update_usage
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    Usage,
    UserError,
)

PROBLEM = Problem("0" * 16, (1, 2), "", (Expert((5, 6, 7, 8)),))


def rollout(index, prefix_len, num_new):
    request = RolloutRequest(PROBLEM, index, 0, 0 if prefix_len else -1, prefix_len)
    completion = Completion(request, (3,) * num_new, (-1.0,) * num_new, FinishReason.STOP)
    return Rollout(completion, WRONG)


GROUP = [rollout(0, 0, 3), rollout(1, 2, 1), rollout(2, 2, 2), rollout(3, 4, 0), rollout(4, 4, 0)]
ROWS = rows_of_group(GROUP, [0.0] * 5, first_of_each_prefix(GROUP))


COST = TokenCost(num_params=1000, num_trained=1000, per_pair=10)


def test_usage_of_rollouts_equals_hand_computed_values():
    usage = rollout_usage([GROUP], num_prefilled=4, cost=COST)
    # Completion tokens attend to themselves and to all tokens before them: 3 + 4 + 5, 5, and 5 + 6 pairs. The prompt
    # and the longest prefix that precedes a completion have 2 + 2 tokens: 10 pairs.
    flops = 2 * 1000 * (6 + 4) + 10 * (12 + 5 + 11 + 10)
    assert usage == Usage(tokens_sampled=6, problems_seen=1, flops=flops)


def test_usage_of_an_update_equals_hand_computed_values():
    usage = update_usage(ROWS, num_iterations=2, num_forward=1, cost=COST)
    # The first four rows have 5, 5, 6, and 6 tokens. The last row is skipped because it has no tokens to train on.
    assert usage == Usage(
        tokens_expert_trained=2 * (2 + 4),
        tokens_trained=2 * (2 + 4 + 6),
        tokens_prompt=2 * 4 * 2,
        flops=7 * (2 * 1000 * 22 + 10 * (15 + 15 + 21 + 21)),
    )


def test_usage_is_added_field_by_field():
    usage = Usage(tokens_trained=1, flops=2.0) + Usage(tokens_trained=3, seconds=0.5)
    assert usage == Usage(tokens_trained=4, flops=2.0, seconds=0.5)


@pytest.mark.parametrize(
    ("unit", "amount", "progress"),
    [
        ("steps", None, 0.3),
        ("steps", 6.0, 0.5),
        ("steps", 20.0, 0.3),  # The run reaches num_steps first.
        ("trained_tokens", 200.0, 0.5),
        ("sampled_tokens", 100.0, 0.8),
        ("flops", 1e4, 0.7),
        ("problems", 24.0, 1.0),
        ("seconds", 5.0, 1.2),
    ],
)
def test_progress_is_relative_to_the_limit_that_is_reached_first(unit, amount, progress):
    usage = Usage(tokens_trained=100, tokens_sampled=80, problems_seen=24, flops=7e3, seconds=6.0)
    assert Budget(unit, amount, num_steps=10).progress(usage, 3) == pytest.approx(progress)


def test_a_budget_of_sampled_tokens_is_rejected_if_none_are_sampled():
    budget = Budget("sampled_tokens", 100.0, num_steps=10)
    budget.check_spent(Usage(tokens_sampled=3), "sft")
    with pytest.raises(UserError, match=r"method\.name=sft does not sample; use trained_tokens"):
        budget.check_spent(Usage(), "sft")
