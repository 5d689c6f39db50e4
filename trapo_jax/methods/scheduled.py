"""Methods whose guidance or weights change during the run: SFT-then-GRPO, CHORD, UFT, and Prefix-RFT."""

from functools import partial
from typing import Annotated, NamedTuple

from pydantic import Field

from trapo_jax.methods import selection, terms
from trapo_jax.methods.guidance import (
    ALWAYS,
    BinomialHints,
    CosinePrefix,
    cosine,
    expert_in_first_stage,
    unguided,
)
from trapo_jax.methods.hyperparameters import (
    Count,
    LearningRate,
    MixedHyperparameters,
    Share,
    Weight,
)
from trapo_jax.methods.method import Method, Schedule, Stage, Term
from trapo_jax.types import MicroGroup, Moment


class SftThenGrpo(MixedHyperparameters):
    """SFT, then GRPO, as two stages with separate optimizer states and learning-rate schedules.

    SFT ends when the first of `sft_share`, `sft_steps`, and `sft_patience` is reached. GRPO uses the schedule in the
    `train` section for the rest of the run. Switching when the validation loss stops falling follows arXiv 2512.11470.
    """

    num_rollouts: Count = 8
    """Rollouts per problem in the second stage."""
    sft_share: Share = 0.5
    """Maximum fraction of the run spent on SFT, measured in the unit of the run's budget."""
    sft_steps: Count | None = None
    """Maximum number of SFT steps; null for no limit."""
    sft_patience: Count | None = None
    """SFT ends after this many consecutive validations without a lower loss on expert solutions; null for no limit."""
    sft_learning_rate: LearningRate | None = None
    """Peak learning rate of SFT; null uses train.learning_rate."""
    sft_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of SFT steps over which the learning rate rises linearly from 0; null uses train.warmup_steps."""
    sft_decay_start: Share | None = None
    """Fraction of the SFT stage after which the learning rate decays linearly; null uses train.decay_start."""
    sft_final_learning_rate_ratio: Share | None = None
    """Learning rate at the end of SFT as a fraction of its peak; null uses train.final_learning_rate_ratio."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            vary=expert_in_first_stage,
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
            ),
            terms=(
                *self.completion_terms(),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            stages=(
                Stage(
                    "sft",
                    share=self.sft_share,
                    num_steps=self.sft_steps,
                    patience=self.sft_patience,
                    learning_rate=self.sft_learning_rate,
                    warmup_steps=self.sft_warmup_steps,
                    decay_start=self.sft_decay_start,
                    final_learning_rate_ratio=self.sft_final_learning_rate_ratio,
                ),
                Stage("rl"),
            ),
            depends_on_length=True,
            source="SFT, then GRPO; a baseline from the TRAPO paper (arXiv 2512.17636, Table 1)",
            notes=("batches contain only expert solutions in the first stage and none afterward",),
            **self.method_fields(),
        )


class ChordHyperparameters(MixedHyperparameters):
    """Hyperparameters shared by both variants of CHORD."""

    clip_low: Share | None = 0.2
    """The ratio of the new to the old policy is clipped from below at 1 - clip_low; null for no lower bound."""
    clip_high: Weight | None = 0.2
    """The ratio of the new to the old policy is clipped from above at 1 + clip_high; null for no upper bound."""
    scale_advantages_by_std: bool = True
    """Divide a group's advantages by their standard deviation."""
    num_rollouts: Count = 8
    """Rollouts per problem."""
    expert_rows_per_rollout: Weight = 4.0
    """Number of additional expert solutions per rollout, taken from other problems."""

    def make_chord(self, name: str, cross_entropy: Term, weight: terms.Weight) -> Method:
        """Builds the method from its name, its SFT term, and the weight of the policy gradient."""
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            select=self.selecting(
                partial(
                    selection.train_all_beside_experts,
                    advantages=self.advantages(selection.advantages_over_group),
                )
            ),
            terms=(*self.completion_terms("token_mean", weight=weight), cross_entropy),
            extra_rows_per_problem=round(self.num_rollouts * self.expert_rows_per_rollout),
            source=f"{name}, arXiv 2508.11408, Trinity-RFT, chord_policy_loss.py",
            published={"rollouts per step": 64, "expert rows per step": 256},
            notes=("expert rows come from problems drawn in addition to the step's problems",),
            **self.method_fields(),
        )


class Chord(ChordHyperparameters):
    """CHORD-mu: clipped GRPO plus SFT on a separate expert batch, with an SFT weight mu that decreases during the run.

    Follows `chord_policy_loss.py` of Trinity-RFT. mu is a function of the step.
    """

    mu_peak: Share = 0.9
    """Weight mu of the SFT loss after the warm-up (GRPO has weight 1 - mu)."""
    mu_valley: Share = 0.05
    """Weight mu of the SFT loss after the decay (GRPO has weight 1 - mu)."""
    mu_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps over which mu rises linearly from 0 to mu_peak."""
    mu_decay_steps: Annotated[int, Field(ge=0)] = 200
    """Number of steps after the warm-up over which mu decays to mu_valley along a half-cosine."""

    def make(self) -> Method:
        mu = Mu(self.mu_peak, self.mu_valley, self.mu_warmup_steps, self.mu_decay_steps)
        weight = Schedule(mu, "mu: linear warm-up to mu_peak, then cosine decay to mu_valley")
        if self.expert_weight != 1.0:
            weight = weight.times(self.expert_weight)
        cross_entropy = terms.cross_entropy(weight, self.normalize_by("token_mean"))
        rest = Schedule(lambda moment: 1.0 - mu(moment), "1 - mu")
        return self.make_chord("CHORD-mu", cross_entropy, rest)


class ChordPhi(ChordHyperparameters):
    """CHORD-phi: like CHORD-mu, but with a constant mu and token weights p (1 - p) in SFT."""

    mu: Share = 0.1
    """Weight mu of the SFT loss (GRPO has weight 1 - mu)."""

    def make(self) -> Method:
        cross_entropy = terms.variance_weighted_cross_entropy(
            self.mu * self.expert_weight, self.normalize_by("token_mean")
        )
        return self.make_chord("CHORD-phi", cross_entropy, 1.0 - self.mu)


class Mu(NamedTuple):
    """The weight of CHORD's SFT loss: linear warm-up from 0 to `peak`, then cosine decay to `valley`."""

    peak: float
    valley: float
    warmup_steps: int
    decay_steps: int

    def __call__(self, moment: Moment) -> float:
        if moment.step < self.warmup_steps:
            return self.peak * moment.step / self.warmup_steps
        decayed = (moment.step - self.warmup_steps) / self.decay_steps if self.decay_steps else 1.0
        return cosine(decayed, start=self.peak, end=self.valley)


class Uft(MixedHyperparameters):
    """UFT: a problem's rollouts start from a hint that gets shorter during the run and has an SFT loss of small weight.

    As in `rl_dataset.py`, `dp_actor.py`, and `run.py` of the released code, the probability q that a slice is part of
    the hint decreases from 0.95 to 0.05 over 300 steps, there are no hints afterward, and a completion is sampled even
    if the hint is the whole solution (without its EOS). Here, slices consist of tokens rather than sentences.
    """

    clip_low: Share | None = 0.2
    """The ratio of the new to the old policy is clipped from below at 1 - clip_low; null for no lower bound."""
    clip_high: Weight | None = 0.2
    """The ratio of the new to the old policy is clipped from above at 1 + clip_high; null for no upper bound."""
    kl_weight: Weight = 0.001
    """Weight of the KL divergence (k3 estimate) from the initial model. A nonzero weight keeps that model in memory."""
    scale_advantages_by_std: bool = True
    """Divide a group's advantages by their standard deviation."""
    expert_weight: Weight = 0.001
    """Weight of the cross-entropy on hints."""
    num_rollouts: Count = 8
    """Rollouts per problem."""
    hint_slices: Annotated[int, Field(ge=0)] = 5
    """Number of slices into which an expert solution is divided."""
    hint_high: Share = 0.95
    """Probability that a slice is part of the hint at the first step."""
    hint_low: Share = 0.05
    """Probability that a slice is part of the hint at step hint_steps."""
    hint_steps: Annotated[int, Field(ge=0)] = 300
    """Number of steps with hints."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=(MicroGroup(self.num_rollouts, 1.0, ALWAYS),),
            always_samples=True,
            vary=BinomialHints(self.hint_slices, self.hint_high, self.hint_low, self.hint_steps),
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
            ),
            terms=(
                *self.completion_terms("token_mean"),
                terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),
            ),
            source="UFT, arXiv 2505.16984, rl_dataset.py",
            published={
                "train.problems_per_step": 256,
                "train.learning_rate": 1e-6,
                "train.num_mini_batches": 4,
                "method.num_rollouts": 4,
            },
            notes=(
                "a hint has Binomial(hint_slices, q) slices; q follows a cosine over hint_steps and is 0 afterward",
            ),
            **self.method_fields(),
        )


class PrefixRft(MixedHyperparameters):
    """Prefix-RFT: one rollout per group starts from a prefix, with a policy gradient on its highest-entropy tokens.

    This implementation follows secondary descriptions only. They disagree on whether the prefix ratio equals the cosine
    schedule or is drawn at random below it; here, the ratio equals the cosine schedule.
    """

    num_rollouts: Count = 7
    """Unguided rollouts per problem, in addition to the rollout with a prefix."""
    prefix_start: Share = 0.95
    """Prefix ratio at the start of the run."""
    prefix_end: Share = 0.05
    """Prefix ratio at the end of the run."""
    top_entropy_share: Share = 0.2
    """Fraction of prefix tokens to train on; the tokens with the highest entropy are selected."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=(*unguided(self.num_rollouts), MicroGroup(1, self.prefix_start, ALWAYS)),
            vary=CosinePrefix(self.prefix_start, self.prefix_end),
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
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
            source="Prefix-RFT, arXiv 2507.01679, implemented from secondary descriptions",
            notes=("the prefix ratio follows a cosine schedule over the run",),
            **self.method_fields(),
        )
