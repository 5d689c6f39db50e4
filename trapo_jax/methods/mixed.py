"""Methods that learn from rollouts and expert solutions at once: LUFFY, RL + SFT, ReLIFT, HPT and SRFT."""

from functools import partial

from trapo_jax.methods import selection, terms
from trapo_jax.methods.constants import Count, MixedConstants, Weight
from trapo_jax.methods.guidance import (
    rollouts_and_expert,
    unguided,
)
from trapo_jax.methods.method import Method


class Luffy(MixedConstants):
    """LUFFY: the expert solution is one more rollout of the group, with a shaped policy gradient.

    `mix_src/mix_core_alg.py` of its code: no clipping, sums divided by a constant, advantages not divided by the
    standard deviation.
    """

    num_rollouts: Count = 7
    """Rollouts per problem, besides the expert solution."""
    gamma: Weight = 0.1
    """Shaping constant of the policy gradient on expert tokens, -A p / (p + gamma)."""

    def make(self) -> Method:
        normalizer = self.normalize_by("constant_mean")
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=partial(
                selection.train_all, advantages=self.advantages(selection.advantages_over_group)
            ),
            terms=(
                *self.completion_terms(),
                terms.shaped_policy_gradient(self.gamma, self.expert_weight, normalizer),
            ),
            source="LUFFY, arXiv 2504.14945, mix_src/mix_core_alg.py",
            published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
            expert_part="whole",
            **self.method_fields(),
        )


class RlPlusSft(MixedConstants):
    """RL and SFT side by side, a baseline of LUFFY's paper; the expert solution is not part of the baseline reward."""

    num_rollouts: Count = 7
    """Rollouts per problem, besides the expert solution."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=partial(
                selection.train_all, advantages=self.advantages(selection.advantages_over_sampled)
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            source="RL with an SFT loss, a baseline of LUFFY, arXiv 2504.14945",
            published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
            expert_part="whole",
            **self.method_fields(),
        )


class Relift(MixedConstants):
    """ReLIFT: RL, and SFT on problems that no rollout solved as soon as enough of them are buffered.

    `relift/trainer.py` of its code: the SFT update follows that of the step, takes the oldest problems, and has an
    AdamW state of its own. (The scripts published later buffer 64 problems and have no entropy bonus.)
    """

    num_rollouts: Count = 8
    """Rollouts per problem."""
    buffer_size: Count = 128
    """Number of unsolved problems that make an SFT update."""
    expert_entropy_weight: Weight = 0.001
    """Weight of the entropy bonus on expert tokens."""
    sft_learning_rate_scale: Weight = 1.0
    """Multiplies the learning rate of SFT updates."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=partial(
                selection.buffer_unsolved,
                buffer_size=self.buffer_size,
                learning_rate_scale=self.sft_learning_rate_scale,
                advantages=self.advantages(selection.advantages_over_group),
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
                terms.entropy_bonus(self.expert_entropy_weight, terms.EXPERT),
            ),
            optimizers=("main", "buffer"),
            buffer_size=self.buffer_size,
            source="ReLIFT, arXiv 2506.07527, relift/trainer.py",
            published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
            notes=(
                "completion and expert tokens are never in the same update, and each kind has an optimizer state",
            ),
            expert_part="whole",
            **self.method_fields(),
        )


class Hpt(MixedConstants):
    """HPT: a problem that the policy cannot solve is learned from its expert solution, any other by RL.

    `mix_trainer.py` of its code (`select_on_off_ada_balance`, `unify_strategy=switch`): gate 0 for Qwen, 2 for Llama; SFT
    coefficient 1.0, 0.3 for models of 1.5B parameters.
    """

    num_rollouts: Count = 8
    """Rollouts per problem."""
    gate: Weight = 0.0
    """A problem solved at most this many times trains its expert solution in place of its rollouts."""
    max_applied_grad_norm: Weight = 80.0
    """Updates whose gradient has a larger norm are skipped."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=partial(
                selection.expert_instead_of_unsolved,
                gate=self.gate,
                advantages=self.advantages(selection.advantages_over_group),
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            max_applied_grad_norm=self.max_applied_grad_norm,
            source="HPT, arXiv 2509.04419, mix_trainer.py",
            published={"train.learning_rate": 5e-6},
            notes=(
                "a problem solved at most `gate` times trains one expert solution and none of its rollouts",
            ),
            expert_part="whole",
            **self.method_fields(),
        )


class Srft(MixedConstants):
    """SRFT: SFT and RL in one step, each weighted by the policy's entropy over the row, as ported by HPT.

    `mix_core_algos.py` (`compute_token_on_off_policy_srft_loss`, `srft_type="paper"`), without its clipping of
    log-probabilities.
    """

    num_rollouts: Count = 7
    """Rollouts per problem, besides the expert solution."""
    expert_weight: Weight = 0.5
    """Weight of the entropy-weighted cross-entropy on expert tokens."""
    gamma: Weight = 0.1
    """Shaping constant of the policy gradient on expert tokens, -A p / (p + gamma)."""
    success_weight: Weight = 0.1
    """Weight of the loss on rollouts with full reward."""

    def make(self) -> Method:
        normalizer = self.normalize_by("constant_mean")
        advantages = self.advantages(selection.advantages_over_group)
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=partial(
                selection.train_all,
                advantages=partial(selection.signs_for_sampled, advantages=advantages),
            ),
            terms=(
                terms.own_successes(self.success_weight, normalizer),
                terms.own_failures(1.0, normalizer),
                *self.regularizers(),
                terms.confident_cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
                terms.shaped_policy_gradient(self.gamma, 1.0, normalizer),
            ),
            source="SRFT, arXiv 2506.19767, as ported by HPT (srft_type=paper)",
            notes=(
                "a rollout's advantage is the sign of its reward; the expert solution's is over all rows",
            ),
            expert_part="whole",
            **self.method_fields(),
        )
