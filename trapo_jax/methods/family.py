"""The family: every method as a class of constants that makes a `Method`, and `METHODS`, which names them.

If a source was looked up, its docstring names the file; the others follow the project's design document, which was not
checked against the source. Published settings that belong to other sections of the config (learning rate, problems
per step) are kept in `Method.published`: they are printed, not applied.

Departures from the papers:

- Token losses are divided by rows * max_completion_length (`constant_mean`) if a source divides a sum by a constant
  or leaves the normalizer open. With this normalizer a token counts the same whatever the other lengths in the batch
  are. SFT losses are divided by the number of trained tokens of the whole batch, not of a micro-batch.
- Advantages are not divided by the group's standard deviation, as in TRAPO, except for CHORD and UFT, whose code does.
- Of the rollouts that start from the same expert prefix, only one has the loss on it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, NamedTuple

from pydantic import Field

from trapo_jax.methods import selection, terms
from trapo_jax.methods.constants import (
    Constants,
    Count,
    ExpertConstants,
    MixedConstants,
    PolicyGradientConstants,
    Share,
    Weight,
)
from trapo_jax.methods.guidance import (
    ALWAYS,
    BinomialHints,
    CosinePrefix,
    ExpertFirst,
    cosine,
    rollouts_and_expert,
    unguided,
    whole_expert,
)
from trapo_jax.methods.method import Method, Schedule, Term
from trapo_jax.methods.micro_grouped import (
    MicroGroupGrpo,
    MicroGroupLuffy,
    MicroGroupSft,
    Trapo,
    TrapoPlus,
)
from trapo_jax.types import MicroGroup, Moment


class Sft(ExpertConstants):
    """Supervised fine-tuning on expert solutions; nothing is sampled."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=whole_expert(),
            terms=(terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),),
            source="supervised fine-tuning on expert solutions",
        )


class Grpo(PolicyGradientConstants):
    """GRPO as TRAPO's paper compares with it: the same step without guidance."""

    num_rollouts: Count = 8
    """Rollouts per problem."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            terms=self.completion_terms(),
            source="GRPO as in TRAPO's comparison, arXiv 2512.17636, Table 1",
            select=partial(
                selection.train_all, advantages=self.advantages(selection.advantages_over_group)
            ),
            **self.method_fields(),
        )


class SftThenGrpo(MixedConstants):
    """SFT for a share of the run, in units of its budget, then GRPO with the same optimizer state and data order."""

    num_rollouts: Count = 8
    """Rollouts per problem in the second stage."""
    sft_share: Share = 0.5
    """Share of the run that is SFT."""
    sft_learning_rate_scale: Weight = 1.0
    """Multiplies the learning rate during SFT."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            vary=ExpertFirst(self.sft_share),
            select=partial(
                selection.train_in_stages,
                until=self.sft_share,
                learning_rate_scale=self.sft_learning_rate_scale,
                advantages=self.advantages(selection.advantages_over_group),
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            depends_on_length=True,
            source="SFT, then GRPO; a baseline of arXiv 2512.17636, Table 1",
            notes=("batches hold only expert solutions until sft_share of the run, then none",),
            **self.method_fields(),
        )


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
            **self.method_fields(),
        )


class ChordConstants(MixedConstants):
    """Constants that both variants of CHORD share."""

    clip_low: Share | None = 0.2
    """Clips the ratio of the new to the old policy below 1 - clip_low; null for no bound."""
    clip_high: Weight | None = 0.2
    """Clips the ratio of the new to the old policy above 1 + clip_high; null for no bound."""
    scale_advantages_by_std: bool = True
    """Divide a group's advantages by their standard deviation."""
    num_rollouts: Count = 8
    """Rollouts per problem."""
    expert_rows_per_rollout: Weight = 4.0
    """Expert solutions of other problems per rollout."""

    def make_chord(self, name: str, cross_entropy: Term, weight: terms.Weight) -> Method:
        """Returns the method with an SFT term, and a weight on the terms on completions."""
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=partial(
                selection.train_all_beside_experts,
                advantages=self.advantages(selection.advantages_over_group),
            ),
            terms=(*self.completion_terms("token_mean", weight=weight), cross_entropy),
            extra_rows_per_problem=round(self.num_rollouts * self.expert_rows_per_rollout),
            source=f"{name}, arXiv 2508.11408, Trinity-RFT, chord_policy_loss.py",
            published={"rollouts per step": 64, "expert rows per step": 256},
            notes=("the expert rows are of problems drawn in addition to those of the step",),
            **self.method_fields(),
        )


class Chord(ChordConstants):
    """CHORD-mu: SFT on a separate expert batch beside clipped GRPO, with a share that falls.

    `chord_policy_loss.py` of Trinity-RFT; mu depends on the step.
    """

    mu_peak: Share = 0.9
    """Share of SFT after the warm-up."""
    mu_valley: Share = 0.05
    """Share of SFT after the decay."""
    mu_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up to mu_peak."""
    mu_decay_steps: Annotated[int, Field(ge=0)] = 200
    """Steps of cosine decay to mu_valley."""

    def make(self) -> Method:
        mu = Mu(self.mu_peak, self.mu_valley, self.mu_warmup_steps, self.mu_decay_steps)
        weight = Schedule(mu, "mu: warm-up to mu_peak, then along a cosine to mu_valley")
        if self.expert_weight != 1.0:
            weight = weight.times(self.expert_weight)
        cross_entropy = terms.cross_entropy(weight, self.normalize_by("token_mean"))
        rest = Schedule(lambda moment: 1.0 - mu(moment), "1 - mu")
        return self.make_chord("CHORD-mu", cross_entropy, rest)


class ChordPhi(ChordConstants):
    """CHORD-phi: like CHORD-mu, with a constant mu and SFT weighted by p (1 - p)."""

    mu: Share = 0.1
    """Share of SFT."""

    def make(self) -> Method:
        cross_entropy = terms.variance_weighted_cross_entropy(
            self.mu * self.expert_weight, self.normalize_by("token_mean")
        )
        return self.make_chord("CHORD-phi", cross_entropy, 1.0 - self.mu)


class Mu(NamedTuple):
    """CHORD's share of SFT: linear warm-up from 0 to `peak`, then along a cosine to `valley`."""

    peak: float
    valley: float
    warmup_steps: int
    decay_steps: int

    def __call__(self, moment: Moment) -> float:
        if moment.step < self.warmup_steps:
            return self.peak * moment.step / self.warmup_steps
        decayed = (moment.step - self.warmup_steps) / self.decay_steps if self.decay_steps else 1.0
        return cosine(decayed, start=self.peak, end=self.valley)


class Uft(MixedConstants):
    """UFT: all rollouts of a problem start from a hint whose length falls; the hint is trained with a small weight.

    `rl_dataset.py` and `run.py` of its code: q falls from 0.95 to 0.05 over 300 steps, and there are no hints after
    that. Slices are of tokens here and of sentences there; a whole hint is the whole solution, and nothing is sampled.
    """

    clip_low: Share | None = 0.2
    """Clips the ratio of the new to the old policy below 1 - clip_low; null for no bound."""
    clip_high: Weight | None = 0.2
    """Clips the ratio of the new to the old policy above 1 + clip_high; null for no bound."""
    kl_weight: Weight = 0.001
    """Weight of the KL divergence (k3) from the initial model, which is kept in memory unless the weight is 0."""
    scale_advantages_by_std: bool = True
    """Divide a group's advantages by their standard deviation."""
    expert_weight: Weight = 0.001
    """Weight of the cross-entropy on hints."""
    num_rollouts: Count = 8
    """Rollouts per problem."""
    hint_slices: Annotated[int, Field(ge=0)] = 5
    """Number of slices that an expert solution is divided into."""
    hint_high: Share = 0.95
    """Probability of a slice being part of the hint at the first step."""
    hint_low: Share = 0.05
    """Probability of a slice being part of the hint at step hint_steps."""
    hint_steps: Annotated[int, Field(ge=0)] = 300
    """Steps with hints."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=(MicroGroup(self.num_rollouts, 1.0, ALWAYS),),
            vary=BinomialHints(self.hint_slices, self.hint_high, self.hint_low, self.hint_steps),
            select=partial(
                selection.train_all, advantages=self.advantages(selection.advantages_over_group)
            ),
            terms=(
                *self.completion_terms("token_mean"),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            source="UFT, arXiv 2505.16984, rl_dataset.py",
            published={"train.problems_per_step": 256, "train.learning_rate": 1e-6},
            notes=(
                "a hint has Binomial(hint_slices, q) slices; q follows a cosine over hint_steps, then no hints",
            ),
            **self.method_fields(),
        )


class PrefixRft(MixedConstants):
    """Prefix-RFT: one rollout of a group starts from a prefix, whose uncertain tokens get the policy gradient.

    From secondary descriptions alone. They disagree on whether the prefix length is drawn at random below the cosine;
    here it is the cosine.
    """

    num_rollouts: Count = 7
    """Unguided rollouts per problem, besides the one with a prefix."""
    prefix_start: Share = 0.95
    """Ratio of the prefix at the start of the run."""
    prefix_end: Share = 0.05
    """Ratio of the prefix at the end of the run."""
    top_entropy_share: Share = 0.2
    """Share of the prefix tokens, those with the highest entropy, that are trained."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=(*unguided(self.num_rollouts), MicroGroup(1, self.prefix_start, ALWAYS)),
            vary=CosinePrefix(self.prefix_start, self.prefix_end),
            select=partial(
                selection.train_all, advantages=self.advantages(selection.advantages_over_group)
            ),
            terms=(
                *self.completion_terms(),
                terms.uncertain_prefix_policy_gradient(
                    self.top_entropy_share,
                    self.expert_weight,
                    self.normalize_by("constant_mean"),
                ),
            ),
            depends_on_length=True,
            source="Prefix-RFT, arXiv 2507.01679, from secondary descriptions",
            notes=("the ratio of the prefix falls along a cosine over the run",),
            **self.method_fields(),
        )


METHODS: Mapping[str, type[Constants]] = {
    "trapo": Trapo,
    "trapo_plus": TrapoPlus,
    "grpo": Grpo,
    "sft": Sft,
    "sft_then_grpo": SftThenGrpo,
    "micro_group_grpo": MicroGroupGrpo,
    "micro_group_sft": MicroGroupSft,
    "micro_group_luffy": MicroGroupLuffy,
    "luffy": Luffy,
    "rl_plus_sft": RlPlusSft,
    "relift": Relift,
    "hpt": Hpt,
    "srft": Srft,
    "chord": Chord,
    "chord_phi": ChordPhi,
    "uft": Uft,
    "prefix_rft": PrefixRft,
}
