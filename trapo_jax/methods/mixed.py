"""Methods that learn from both rollouts and expert solutions: LUFFY, RL + SFT, ReLIFT, HPT, and SRFT."""

from functools import partial

from trapo_jax.methods import selection, terms
from trapo_jax.methods.guidance import (
    rollouts_and_expert,
    unguided,
)
from trapo_jax.methods.hyperparameters import (
    MICRO_BATCH_NOTE,
    Count,
    MicroBatchedSftHyperparameters,
    MixedHyperparameters,
    Positive,
    Weight,
)
from trapo_jax.methods.method import Method


class Luffy(MixedHyperparameters):
    """LUFFY: the expert solution is an additional rollout of the group, with a shaped policy gradient.

    As in `mix_src/mix_core_alg.py` of the released code, there is no clipping, sums are divided by a constant, and
    advantages are not divided by the standard deviation.
    """

    num_rollouts: Count = 7
    """Rollouts per problem, in addition to the expert solution."""
    gamma: Weight = 0.1
    """Shaping constant gamma of the loss on expert tokens, -A p / (p + gamma)."""

    def make(self) -> Method:
        normalizer = self.normalize_by("constant_mean")
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
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


class RlPlusSft(MicroBatchedSftHyperparameters):
    """RL with an SFT loss, a baseline from the LUFFY paper. A group's mean reward excludes the expert solution."""

    num_rollouts: Count = 7
    """Rollouts per problem, in addition to the expert solution."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.train_all,
                    advantages=self.advantages(selection.advantages_over_sampled),
                )
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.sft_weight, self.normalize_by("token_mean")),
            ),
            source="RL with an SFT loss, a baseline from the LUFFY paper (arXiv 2504.14945), mix_src/mix_actor.py",
            notes=(MICRO_BATCH_NOTE,),
            published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
            expert_part="whole",
            **self.method_fields(),
        )


class Relift(MixedHyperparameters):
    """ReLIFT: RL, with SFT updates on buffered problems that no rollout solved.

    As in `relift/trainer.py` of the released code, the SFT update follows the RL update of the step, trains on the
    newest problems in the buffer, and has a separate AdamW state. Later published scripts buffer 64 problems and have
    no entropy bonus.
    """

    num_rollouts: Count = 8
    """Rollouts per problem."""
    buffer_size: Count = 128
    """Number of buffered unsolved problems that triggers an SFT update."""
    expert_entropy_weight: Weight = 0.001
    """Weight of the entropy bonus on expert tokens."""
    sft_learning_rate_scale: Weight = 1.0
    """Multiplier for the learning rate of SFT updates."""
    rl_max_grad_norm: Positive | None = 0.7
    """Maximum global gradient norm of RL updates; null uses train.max_grad_norm, as SFT updates always do."""

    entropy_kinds = (terms.COMPLETION,)  # Expert tokens have a separate entropy bonus.

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.buffer_unsolved,
                    buffer_size=self.buffer_size,
                    learning_rate_scale=self.sft_learning_rate_scale,
                    max_grad_norm=self.rl_max_grad_norm,
                    advantages=self.advantages(selection.advantages_over_group),
                )
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
                terms.entropy_bonus(self.expert_entropy_weight, (terms.EXPERT,), "expert_entropy"),
            ),
            optimizers=("main", "buffer"),
            buffer_size=self.buffer_size,
            source="ReLIFT, arXiv 2506.07527, relift/trainer.py",
            published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
            notes=(
                "completion and expert tokens are trained in separate updates, each with its own optimizer state",
            ),
            expert_part="whole",
            **self.method_fields(),
        )


class Hpt(MicroBatchedSftHyperparameters):
    """HPT: trains on the expert solutions of problems that the policy cannot solve, and uses RL for all other problems.

    In `mix_trainer.py` of the released code (`select_on_off_ada_balance`, `unify_strategy=switch`), the gate is 0 for
    Qwen and 2 for Llama, and the SFT coefficient is 1.0, or 0.3 for models with 1.5B parameters.
    """

    num_rollouts: Count = 8
    """Rollouts per problem."""
    gate: Weight = 0.0
    """If the sum of a problem's rewards is at most this, its expert solution replaces its rollouts in the update."""
    max_applied_grad_norm: Weight = 1.25
    """Updates with a larger gradient norm are skipped. The released code uses 80, for gradients summed over 64 rows."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.expert_instead_of_unsolved,
                    gate=self.gate,
                    advantages=self.advantages(selection.advantages_over_group),
                )
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.sft_weight, self.normalize_by("token_mean")),
            ),
            max_applied_grad_norm=self.max_applied_grad_norm,
            source="HPT, arXiv 2509.04419, mix_trainer.py",
            published={"train.learning_rate": 5e-6},
            notes=(
                "if a problem is solved at most `gate` times, one expert solution replaces its rollouts in the update",
                MICRO_BATCH_NOTE,
            ),
            expert_part="whole",
            **self.method_fields(),
        )


class Srft(MicroBatchedSftHyperparameters):
    """SRFT: SFT and RL in one step, each weighted by the policy's mean entropy over the row, as in HPT's port of SRFT.

    Follows `mix_core_algos.py` (`compute_token_on_off_policy_srft_loss`, `srft_type="paper"`), except that
    log-probabilities are not clipped.
    """

    num_rollouts: Count = 7
    """Rollouts per problem, in addition to the expert solution."""
    expert_weight: Weight = 0.5
    """Weight of the entropy-weighted cross-entropy on expert tokens."""
    gamma: Weight = 0.1
    """Shaping constant gamma of the loss on expert tokens, -A p / (p + gamma)."""
    success_weight: Weight = 0.1
    """Weight of the loss on rollouts with full reward."""

    def make(self) -> Method:
        normalizer = self.normalize_by("constant_mean")
        advantages = self.advantages(selection.advantages_over_group)
        return Method(
            name="",
            micro_groups=rollouts_and_expert(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.train_all,
                    advantages=partial(selection.signs_for_sampled, advantages=advantages),
                )
            ),
            terms=(
                terms.own_successes(self.success_weight, normalizer),
                terms.own_failures(1.0, normalizer),
                *self.regularizers(),
                terms.confident_cross_entropy(self.sft_weight, self.normalize_by("token_mean")),
                terms.shaped_policy_gradient(self.gamma, 1.0, normalizer),
            ),
            source="SRFT, arXiv 2506.19767, as in HPT's port of SRFT (srft_type=paper)",
            notes=(
                "a rollout's advantage is +1 for full reward and -1 otherwise; the expert solution's advantage is "
                "relative to the mean over all rows",
                MICRO_BATCH_NOTE,
            ),
            expert_part="whole",
            **self.method_fields(),
        )
