"""Computes metrics and the resource usage of collected rollouts, and checks that enough of them have rewards."""

from collections.abc import Sequence
from statistics import fmean

from trapo_jax.models import TokenCost, count_attention_pairs
from trapo_jax.rewards import describe_reasons
from trapo_jax.types import FinishReason, Judgment, Rollout, TrainingFailed, Usage, Verdict


def rollout_metrics(
    groups: Sequence[Sequence[Rollout]], *, num_micro_groups: int
) -> dict[str, float]:
    """Returns metrics of rewards, guidance, and completions.

    `guidance/level_i` is the share of problems whose last guided micro-group is i. Level 0 includes problems without a
    guided micro-group.

    `reward/mean` includes rollouts that are whole expert solutions. The following metrics include only sampled rollouts
    with a reward, and are absent if there are none:

    - `reward/sampled_mean`: their mean reward.
    - `reward/sampled_positive`: the share of them with a positive reward from the first reward function.
    - `reward/no_answer`: the share of them in which the first reward function found no answer. This metric is also
      absent if the function does not look for answers.
    - `reward/num_sampled`: their number.
    - `reward/num_right`: the number of them with a reward of 1.

    `reward/unguided_mean` and `reward/num_unguided` include only rollouts without an expert prefix; the mean is absent
    if there are none.

    Args:
      groups: the rollouts of each problem.
      num_micro_groups: the method's number of micro-groups, and therefore of levels.
    """
    rollouts = [rollout for group in groups for rollout in group]
    graded = [[r for r in group if r.grade.reward is not None] for group in groups]
    unguided = [r.reward for group in graded for r in group if r.request.prefix_len == 0]
    sampled = [r for group in graded for r in group if _is_sampled(r)]
    levels = [
        max((r.request.micro_group for r in group if r.request.prefix_len), default=0)
        for group in groups
    ]
    lens = [len(r.completion.token_ids) for r in rollouts if r.completion.token_ids]
    finish_reasons = [rollout.completion.finish_reason for rollout in rollouts]
    return {
        "reward/mean": _mean([r.reward for group in graded for r in group]),
        **_sampled_rewards(sampled),
        **({"reward/unguided_mean": fmean(unguided)} if unguided else {}),
        "reward/num_unguided": len(unguided),
        "reward/groups_with_signal": fmean(len({r.reward for r in group}) > 1 for group in graded),
        "reward/missing": fmean(r.grade.reward is None for r in rollouts),
        **failure_rates(rollouts),
        **rewards_by_function(rollouts),
        "guidance/ratio_mean": fmean(r.request.ratio for r in rollouts),
        **{
            f"guidance/level_{i}": fmean(level == i for level in levels)
            for i in range(num_micro_groups)
        },
        "completion/len_mean": _mean(lens),
        "completion/truncated": fmean(reason == "length" for reason in finish_reasons),
    }


def _is_sampled(rollout: Rollout) -> bool:
    return rollout.completion.finish_reason is not FinishReason.NOT_SAMPLED


def _sampled_rewards(sampled: Sequence[Rollout]) -> dict[str, float]:
    if not sampled:
        return {}
    firsts = [next(iter(r.grade.judgments.values())).reward for r in sampled]
    found = [r.grade.found_answer for r in sampled if r.grade.found_answer is not None]
    return {
        "reward/sampled_mean": fmean(r.reward for r in sampled),
        "reward/sampled_positive": fmean(bool(reward) for reward in firsts),
        "reward/num_sampled": len(sampled),
        "reward/num_right": sum(r.reward == 1.0 for r in sampled),
        **({"reward/no_answer": fmean(not f for f in found)} if found else {}),
    }


def failure_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the shares of rollouts for which a reward function failed or exceeded its time limit."""
    reasons = [set(r.grade.missing.values()) for r in rollouts]
    return {
        "reward/error_rate": fmean(bool(of - {Verdict.TIMEOUT}) for of in reasons),
        "reward/timeout_rate": fmean(Verdict.TIMEOUT in of for of in reasons),
    }


def rewards_by_function(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the mean reward of each function, `rewards/<name>`, if there are several."""
    judgments = judgments_by_function(rollouts)
    if len(judgments) < 2:
        return {}
    means = {
        n: _mean([j.reward for j in of if j.reward is not None]) for n, of in judgments.items()
    }
    return {f"rewards/{name}": mean for name, mean in means.items()}


def judgments_by_function(rollouts: Sequence[Rollout]) -> dict[str, list[Judgment]]:
    """Returns the judgments of each reward function, keyed by name."""
    by_function: dict[str, list[Judgment]] = {}
    for rollout in rollouts:
        for name, judgment in rollout.grade.judgments.items():
            by_function.setdefault(name, []).append(judgment)
    return by_function


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def graded_groups(groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
    """Returns the groups without the rollouts whose reward is missing. Groups that become empty are dropped."""
    graded = [[r for r in group if r.grade.reward is not None] for group in groups]
    return [group for group in graded if group]


def rollout_usage(
    groups: Sequence[Sequence[Rollout]], *, num_prefilled: int, cost: TokenCost
) -> Usage:
    """Returns the tokens and FLOPs spent on sampling a step's rollouts.

    Args:
      groups: the rollouts of each problem.
      num_prefilled: number of prefilled prompt and prefix tokens.
      cost: the model's FLOPs per token.
    """
    completions = [rollout.completion for group in groups for rollout in group]
    num_sampled = sum(len(c.token_ids) for c in completions)
    num_pairs = sum(
        count_attention_pairs(c.request.start_len + len(c.token_ids))
        - count_attention_pairs(c.request.start_len)
        for c in completions
    )
    # A problem's longest context extends all shorter ones, so its attention pairs include all of theirs.
    starts = [[r.request.start_len for r in g if r.completion.token_ids] for g in groups]
    num_pairs += sum(count_attention_pairs(max(lens, default=0)) for lens in starts)
    return Usage(
        tokens_sampled=num_sampled,
        problems_seen=len(groups),
        flops=cost.forward(num_sampled + num_prefilled, num_pairs),
    )


def check_grades(groups: Sequence[Sequence[Rollout]], step: int, *, max_error_rate: float) -> None:
    """Checks that every reward function judged enough rollouts.

    Raises:
      TrainingFailed: if the share of rollouts on which a function failed or timed out exceeds `max_error_rate`.
    """
    rollouts = [rollout for group in groups for rollout in group]
    for name, judgments in judgments_by_function(rollouts).items():
        num_missing = sum(judgment.reward is None for judgment in judgments)
        if num_missing <= max_error_rate * len(judgments):
            continue
        reasons = describe_reasons(j.reason for j in judgments if j.reward is None)
        raise TrainingFailed(
            f"step {step}: the reward function {name} judged {len(judgments) - num_missing} of {len(judgments)} "
            f"rollouts ({reasons}); the share without a reward exceeds rewards.max_error_rate={max_error_rate}"
        )
