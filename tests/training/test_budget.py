"""What is counted, and when that ends a run."""

import pytest

from trapo_jax.config import load_config
from trapo_jax.methods.selection import first_of_each_prefix, rows_of_group
from trapo_jax.models import TokenCost
from trapo_jax.train import check_budget
from trapo_jax.training.budget import Budget, Counters
from trapo_jax.types import (
    Completion,
    Expert,
    FinishReason,
    Problem,
    Rollout,
    RolloutRequest,
    UserError,
    Verdict,
)

PROBLEM = Problem("0" * 16, (1, 2), "", (Expert((5, 6, 7, 8)),))


def rollout(index, prefix_len, num_own):
    request = RolloutRequest(PROBLEM, index, 0, 0 if prefix_len else -1, prefix_len)
    completion = Completion(request, (3,) * num_own, (-1.0,) * num_own, FinishReason.STOP)
    return Rollout(completion, Verdict.WRONG, 0.0)


GROUP = [rollout(0, 0, 3), rollout(1, 2, 1), rollout(2, 2, 2), rollout(3, 4, 0), rollout(4, 4, 0)]
ROWS = rows_of_group(GROUP, [0.0] * 5, first_of_each_prefix(GROUP))


def test_counters_by_hand():
    counters = Counters()
    cost = TokenCost(num_params=1000, num_trained=1000, per_pair=10)
    counters.count_rollouts([GROUP], prefilled_tokens=4, cost=cost)
    assert (counters.tokens_sampled, counters.problems_seen) == (6, 1)
    # Own tokens see themselves and what is before them: 3 + 4 + 5, 5, 5 + 6; the contexts, up to 2 + 2 tokens: 10.
    assert counters.flops == 2 * 1000 * (6 + 4) + 10 * (12 + 5 + 11 + 10)
    counters.count_update(ROWS, num_iterations=2, num_forward=1, cost=cost)
    # Rows of 5, 5, 6 and 6 tokens; the last one has nothing to train.
    assert counters.tokens_expert_trained == 2 * (2 + 4)
    assert counters.tokens_trained == 2 * (2 + 4 + 6)
    assert counters.tokens_prompt == 2 * 4 * 2
    sampling = 20000 + 380
    assert counters.flops == sampling + 7 * (2 * 1000 * 22 + 10 * (15 + 15 + 21 + 21))


@pytest.mark.parametrize(
    ("unit", "amount", "progress"),
    [
        ("steps", None, 0.3),
        ("steps", 6.0, 0.5),
        ("steps", 20.0, 0.3),  # num_steps comes first
        ("trained_tokens", 200.0, 0.5),
        ("sampled_tokens", 100.0, 0.8),
        ("flops", 1e4, 0.7),
        ("problems", 24.0, 1.0),
        ("seconds", 5.0, 1.2),
    ],
)
def test_progress_is_what_comes_first(unit, amount, progress):
    counters = Counters(
        tokens_trained=100, tokens_sampled=80, problems_seen=24, flops=7e3, seconds=6.0
    )
    assert Budget(unit, amount, num_steps=10).progress(counters, 3) == pytest.approx(progress)


def test_a_budget_of_samples_that_none_takes_is_refused():
    options = [("train.budget_unit", "sampled_tokens"), ("train.budget", "100")]
    config = load_config(None, [("method.name", "sft"), *options])
    check_budget(config, {"tokens/sampled": 3})
    with pytest.raises(UserError, match=r"method\.name=sft samples none; give trained_tokens"):
        check_budget(config, {"tokens/sampled": 0})
