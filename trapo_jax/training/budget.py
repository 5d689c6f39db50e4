"""What a run has spent, counted exactly, and when that ends it.

FLOPs are counted by formula, not measured: 2 N for each token that goes through the model (N parameters, without an
input embedding that is no matrix product), three times that where it is trained (twice where adapters alone are: no gradients of weights), and attention's products for each
pair of tokens that sees each other. What a compiler computes anew to save memory, padding, and keys out of a sliding
window are not looked at; nor are attention's products where an unfinished completion is run through the model again.
"""

import dataclasses
from collections.abc import Sequence

from trapo_jax.models import TokenCost, count_attention_pairs
from trapo_jax.types import Rollout, TrainRow


@dataclasses.dataclass
class Counters:
    """Cumulative over the run; part of the checkpoint.

    Attributes:
      tokens_trained: own and expert tokens with a loss, once for each update made from them.
      tokens_expert_trained: the expert's among them.
      tokens_prompt: prompt tokens of the rows that were trained, likewise.
      tokens_sampled: drawn by the policy, trained or not.
      problems_seen: whose rollouts were sampled.
      flops: see the module.
      seconds: of sampling, judging and training.
    """

    tokens_trained: int = 0
    tokens_expert_trained: int = 0
    tokens_prompt: int = 0
    tokens_sampled: int = 0
    problems_seen: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def count_rollouts(
        self, groups: Sequence[Sequence[Rollout]], *, prefilled_tokens: int, cost: TokenCost
    ) -> None:
        """A step's sampling; `prefilled_tokens` of prompts and prefixes went through the model."""
        rollouts = [rollout.completion for group in groups for rollout in group]
        sampled = sum(len(c.token_ids) for c in rollouts)
        pairs = sum(
            count_attention_pairs(c.request.start_len + len(c.token_ids))
            - count_attention_pairs(c.request.start_len)
            for c in rollouts
        )
        # Of every problem's contexts the longest is the extension of the others.
        starts = [[r.request.start_len for r in g if r.completion.token_ids] for g in groups]
        pairs += sum(count_attention_pairs(max(lens, default=0)) for lens in starts)
        self.tokens_sampled += sampled
        self.problems_seen += len(groups)
        self.flops += cost.forward(sampled + prefilled_tokens, pairs)

    def count_update(
        self, rows: Sequence[TrainRow], *, num_iterations: int, num_forward: int, cost: TokenCost
    ) -> None:
        """`num_iterations` updates from the rows, and `num_forward` passes of their log-probabilities alone."""
        rows = [row for row in rows if row.num_trained]
        expert = sum(row.num_expert_trained for row in rows)
        prompt = sum(len(row.completion.request.problem.prompt_ids) for row in rows)
        self.tokens_expert_trained += num_iterations * expert
        self.tokens_prompt += num_iterations * prompt
        self.tokens_trained += num_iterations * (expert + sum(row.num_own for row in rows))
        tokens, pairs = (
            sum(row.length for row in rows),
            sum(count_attention_pairs(row.length) for row in rows),
        )
        self.flops += num_iterations * cost.update(tokens, pairs)
        self.flops += num_forward * cost.forward(tokens, pairs)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What ends a run: `num_steps`, or so much spent, whichever comes first.

    Attributes:
      unit: a key of `UNITS`, or "steps".
      amount: of the unit; None for none but `num_steps`.
      num_steps: at most.
    """

    unit: str
    amount: float | None
    num_steps: int

    def progress(self, counters: Counters, step: int) -> float:
        """Share of the run that is over after `step` steps; 1 or more at its end."""
        share = step / self.num_steps
        if self.amount is None:
            return share
        spent = step if self.unit == "steps" else getattr(counters, UNITS[self.unit])
        return max(share, spent / self.amount)


UNITS = {
    "trained_tokens": "tokens_trained",
    "sampled_tokens": "tokens_sampled",
    "flops": "flops",
    "problems": "problems_seen",
    "seconds": "seconds",
}
