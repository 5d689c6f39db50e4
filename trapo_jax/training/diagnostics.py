"""Metrics that the train step computes from token log-probabilities, accumulated over micro-batches.

A micro-batch contributes sums and maxima; `step_metrics` turns the accumulated values into the step's metrics.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trapo_jax.methods import Method, TokenInputs
from trapo_jax.types import TokenKind, TrainBatch

PROB_BINS = 10  # number of bins in the histogram of expert token probabilities

Metrics = dict[str, jax.Array]


def completion_statistics(
    inputs: TokenInputs, old_logprobs: jax.Array, batch: TrainBatch, method: Method
) -> tuple[Metrics, Metrics]:
    """Returns sums and maxima over completion tokens.

    They describe the gap between the log-probabilities of sampler and trainer, the ratio to the old policy, and
    clipping.

    Args:
      inputs: inputs of the loss terms; `logprobs` carries no gradient.
      old_logprobs: float32 `[B, T - 1]`, log-probabilities under the policy before the batch's first update.
      batch: the micro-batch.
      method: provides the clipping bounds.
    """
    where = batch.kinds[:, 1:] == TokenKind.COMPLETION
    # Before the first update, sampler and trainer have the same weights, except for stale tokens.
    gap = jnp.where(where, jnp.abs(old_logprobs - batch.sampler_logprobs[:, 1:]), 0.0)
    ratio = jnp.exp(jnp.where(where, inputs.logprobs - inputs.old_logprobs, 0.0))
    lowest = -jnp.inf if method.clip_low is None else 1 - method.clip_low
    highest = jnp.inf if method.clip_high is None else 1 + method.clip_high
    # Clipping removes the gradient only if the clipped objective is smaller than the unclipped one.
    clipped = (ratio < lowest) & (inputs.advantages < 0)
    clipped |= (ratio > highest) & (inputs.advantages > 0)
    sums = {
        "policy/logprob_gap_sum": jnp.sum(gap),
        "policy/ratio_sum": jnp.sum(jnp.where(where, ratio, 0.0)),
        "policy/num_clipped": jnp.sum(where & clipped, dtype=jnp.float32),
    }
    return sums, {"policy/logprob_gap_max": jnp.max(gap), "policy/ratio_max": jnp.max(ratio)}


def expert_statistics(
    probs: jax.Array, abs_logprob_grad: jax.Array, kinds: jax.Array, alpha: float
) -> Metrics:
    """Returns sums over trained expert tokens.

    Args:
      probs: float32 `[B, T - 1]`, probability of each token.
      abs_logprob_grad: float32 `[B, T - 1]`, |d objective / d logprob|.
      kinds: int8 `[B, T - 1]`, token kinds.
      alpha: trust-region bound in (0, 1].
    """
    where = kinds == TokenKind.EXPERT_TRAINED
    # Half of the L1 norm of the gradient with respect to the logits.
    logit_grad = jnp.where(where, abs_logprob_grad * (1 - probs), 0.0)
    bins = jnp.clip((probs * PROB_BINS).astype(jnp.int32), 0, PROB_BINS - 1)
    by_bin = [jnp.sum(where & (bins == i), dtype=jnp.float32) for i in range(PROB_BINS)]
    return {
        "expert/prob_sum": jnp.sum(jnp.where(where, probs, 0.0)),
        "expert/num_below_alpha": jnp.sum(where & (probs < alpha)),
        "expert/logit_grad_sum": jnp.sum(logit_grad),
        "expert/logit_grad_sum_inside": jnp.sum(jnp.where(probs >= alpha, logit_grad, 0.0)),
        "expert/num_by_bin": jnp.stack(by_bin),
    }


def step_metrics(
    sums: Mapping[str, Any],
    maxima: Metrics,
    batch: TrainBatch,
    *,
    grad_norm: jax.Array,
    applied: jax.Array,
) -> Metrics:
    """Returns the metrics of a step over the whole batch.

    `expert/prob_from_x` is the share of trained expert tokens with a probability in [x, x + 0.1).
    `expert/gradient_share_inside` is the share of their gradient (L1 norm with respect to the logits) that comes from
    tokens inside the trust region (with a probability of at least alpha). `policy/clipped_share` is the share of
    completion tokens whose gradient is removed by clipping.

    Args:
      sums: sums over all micro-batches.
      maxima: maxima over all micro-batches.
      batch: the whole batch.
      grad_norm: float32 [], global norm of the gradient.
      applied: bool [], whether the update was applied.
    """
    kinds = batch.kinds[..., 1:]
    num_completion = jnp.maximum(1, jnp.sum(kinds == TokenKind.COMPLETION))
    num_expert = jnp.maximum(1, jnp.sum(kinds == TokenKind.EXPERT_TRAINED))
    logit_grad = sums["expert/logit_grad_sum"]
    return {
        **{name: value for name, value in sums.items() if name.startswith("loss/")},
        "policy/entropy": sums["policy/entropy"],
        "policy/logprob_gap_mean": sums["policy/logprob_gap_sum"] / num_completion,
        "policy/ratio_mean": sums["policy/ratio_sum"] / num_completion,
        "policy/clipped_share": sums["policy/num_clipped"] / num_completion,
        **maxima,
        "expert/prob_mean": sums["expert/prob_sum"] / num_expert,
        "expert/share_below_alpha": sums["expert/num_below_alpha"] / num_expert,
        "expert/gradient_share_inside": sums["expert/logit_grad_sum_inside"]
        / jnp.where(logit_grad == 0, 1.0, logit_grad),
        **{
            f"expert/prob_from_{i / PROB_BINS:.1f}": count / num_expert
            for i, count in enumerate(sums["expert/num_by_bin"])
        },
        "optimizer/grad_norm": grad_norm,
        "optimizer/skipped": 1 - applied.astype(jnp.int32),
    }
