"""Statistics of collected rollouts: metrics, usage, and the check that enough of them could be graded."""

from collections.abc import Sequence
from statistics import fmean

from trapo_jax.models import TokenCost, count_attention_pairs
from trapo_jax.types import Rollout, TrainingFailed, Usage, Verdict


def rollout_metrics(
    groups: Sequence[Sequence[Rollout]], *, num_micro_groups: int
) -> dict[str, float]:
    """Returns metrics of rewards, guidance and completions.

    `guidance/level_i` is the share of problems whose last guided micro-group is i; level 0 means that no
    micro-group was guided.

    Args:
      groups: the rollouts of each problem.
      num_micro_groups: number of micro-groups of the method, which is the number of levels.
    """
    rollouts = [rollout for group in groups for rollout in group]
    unguided = [r.reward for r in rollouts if r.request.prefix_len == 0]
    levels = [
        max((r.request.micro_group for r in group if r.request.prefix_len), default=0)
        for group in groups
    ]
    lens = [len(r.completion.token_ids) for r in rollouts if r.completion.token_ids]
    verdicts = [rollout.verdict for rollout in rollouts]
    finish_reasons = [rollout.completion.finish_reason for rollout in rollouts]
    return {
        "reward/mean": fmean(r.reward for r in rollouts),
        "reward/unguided_mean": fmean(unguided) if unguided else 0.0,
        "reward/groups_with_signal": fmean(len({r.reward for r in group}) > 1 for group in groups),
        "reward/error_rate": fmean(v is Verdict.ERROR for v in verdicts),
        "reward/timeout_rate": fmean(v is Verdict.TIMEOUT for v in verdicts),
        "guidance/ratio_mean": fmean(r.request.ratio for r in rollouts),
        **{
            f"guidance/level_{i}": fmean(level == i for level in levels)
            for i in range(num_micro_groups)
        },
        "completion/len_mean": fmean(lens) if lens else 0.0,
        "completion/truncated": fmean(reason == "length" for reason in finish_reasons),
    }


def rollout_usage(
    groups: Sequence[Sequence[Rollout]], *, num_prefilled: int, cost: TokenCost
) -> Usage:
    """Returns the tokens and FLOPs that sampling a step's rollouts took.

    Args:
      groups: the rollouts of each problem.
      num_prefilled: tokens of prompts and prefixes that went through the model.
      cost: FLOPs per token of the model.
    """
    completions = [rollout.completion for group in groups for rollout in group]
    num_sampled = sum(len(c.token_ids) for c in completions)
    num_pairs = sum(
        count_attention_pairs(c.request.start_len + len(c.token_ids))
        - count_attention_pairs(c.request.start_len)
        for c in completions
    )
    # The longest context of a problem extends all of its shorter ones.
    starts = [[r.request.start_len for r in g if r.completion.token_ids] for g in groups]
    num_pairs += sum(count_attention_pairs(max(lens, default=0)) for lens in starts)
    return Usage(
        tokens_sampled=num_sampled,
        problems_seen=len(groups),
        flops=cost.forward(num_sampled + num_prefilled, num_pairs),
    )


def check_grades(groups: Sequence[Sequence[Rollout]], step: int, *, max_error_rate: float) -> None:
    """Checks that enough rollouts could be graded; one that failed counts as reward 0 in the advantages.

    Raises:
      TrainingFailed: if the grader failed or timed out on more than the share `max_error_rate` of them.
    """
    verdicts = [rollout.verdict for group in groups for rollout in group]
    errors, timeouts = verdicts.count(Verdict.ERROR), verdicts.count(Verdict.TIMEOUT)
    if errors + timeouts > max_error_rate * len(verdicts):
        raise TrainingFailed(
            f"step {step}: of {len(verdicts)} rollouts the grader failed on {errors} and timed out on {timeouts}, "
            f"more than rewards.max_error_rate={max_error_rate}; warnings above, if any, say why"
        )
