"""The family: every method as a function from its constants to a `Method`, by name.

Where a source was looked up, its docstring names the file; the rest follows the project's design page, which was
not checked at the source. Published numbers that belong to other sections of the config (learning rate, problems a
step) are kept in `Method.published`: they are printed, not set.

Departures from the papers, and why:

- Token losses are divided by rows x max_completion_length (`constant_mean`), where a source divides a sum by a
  constant or leaves the normaliser open; this one makes a token count the same whatever the batch's other
  lengths are. SFT's are divided by the number of trained tokens of the whole batch, not of a micro-batch.
- Advantages are not divided by the group's standard deviation, as in TRAPO, but for CHORD and UFT, whose code does.
- Of rollouts that start from the same expert prefix one alone carries the expert's loss.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from trapo_jax.methods import selection, terms
from trapo_jax.methods.common import Common, share, size, times
from trapo_jax.methods.guidance import (
    ALWAYS,
    BinomialHints,
    CosinePrefix,
    ExpertFirst,
    cosine,
    own_and_expert,
    unguided,
    whole_expert,
)
from trapo_jax.methods.method import Method, Schedule, Term
from trapo_jax.methods.micro_grouped import (
    micro_group_grpo,
    micro_group_luffy,
    micro_group_sft,
    trapo,
    trapo_plus,
)
from trapo_jax.types import MicroGroup, Moment


def sft(common: Common) -> Method:
    """Supervised fine-tuning on the expert's solutions; nothing is sampled."""
    common = common.or_else(expert_weight=1.0)._replace(kl_weight=None)
    return Method(
        name="sft",
        micro_groups=whole_expert(),
        terms=(terms.cross_entropy(common.weight, common.normalize_by("token_mean")),),
        source="supervised fine-tuning on the expert's solutions",
        **common.of_method(),
    )


def grpo(common: Common, *, num_own: int = 8) -> Method:
    """GRPO as TRAPO's paper compares with it: the same step without guidance."""
    return Method(
        name="grpo",
        micro_groups=unguided(num_own),
        terms=common.own_terms(),
        source="GRPO as in TRAPO's comparison, arXiv 2512.17636, Table 1",
        select=partial(
            selection.train_all, advantages=common.advantages(selection.advantages_over_group)
        ),
        **common.of_method(),
    )


def sft_then_grpo(
    common: Common,
    *,
    num_own: int = 8,
    sft_share: float = 0.5,
    sft_learning_rate_scale: float = 1.0,
) -> Method:
    """SFT for a share of the run, whatever it is measured in, then GRPO; optimiser state and data go on."""
    common = common.or_else(expert_weight=1.0)
    until = share("sft_share", sft_share)
    advantages = common.advantages(selection.advantages_over_group)
    return Method(
        name="sft_then_grpo",
        micro_groups=unguided(num_own),
        vary=ExpertFirst(until),
        select=partial(
            selection.train_in_stages,
            until=until,
            learning_rate_scale=sft_learning_rate_scale,
            advantages=advantages,
        ),
        terms=(
            *common.own_terms(),
            terms.cross_entropy(common.weight, common.normalize_by("token_mean")),
        ),
        source="SFT, then GRPO; a baseline of arXiv 2512.17636, Table 1",
        notes=("until sft_share of the run is over the batches hold experts only, then none",),
        **common.of_method(),
    )


def luffy(common: Common, *, num_own: int = 7, gamma: float = 0.1) -> Method:
    """LUFFY: the expert's solution is one more rollout of the group, with a shaped policy gradient.

    `mix_src/mix_core_alg.py` of its code: no clipping, sums divided by a constant, advantages not divided by the
    standard deviation.
    """
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    return Method(
        name="luffy",
        micro_groups=own_and_expert(num_own),
        select=partial(
            selection.train_all, advantages=common.advantages(selection.advantages_over_group)
        ),
        terms=(
            *common.own_terms(),
            terms.shaped_policy_gradient(gamma, common.weight, normalizer),
        ),
        source="LUFFY, arXiv 2504.14945, mix_src/mix_core_alg.py",
        published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
        **common.of_method(),
    )


def rl_plus_sft(common: Common, *, num_own: int = 7) -> Method:
    """RL and SFT side by side, a baseline of LUFFY's paper: the expert is no part of the baseline."""
    common = common.or_else(expert_weight=1.0)
    return Method(
        name="rl_plus_sft",
        micro_groups=own_and_expert(num_own),
        select=partial(
            selection.train_all, advantages=common.advantages(selection.advantages_over_own)
        ),
        terms=(
            *common.own_terms(),
            terms.cross_entropy(common.weight, common.normalize_by("token_mean")),
        ),
        source="RL with an SFT loss, a baseline of LUFFY, arXiv 2504.14945",
        published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
        **common.of_method(),
    )


def relift(
    common: Common,
    *,
    num_own: int = 8,
    buffer_size: int = 128,
    expert_entropy_weight: float = 0.001,
    sft_learning_rate_scale: float = 1.0,
) -> Method:
    """ReLIFT: RL, and SFT on problems that no rollout solved, once enough of them are buffered.

    `relift/trainer.py` of its code: the SFT update comes after the step's own, takes the oldest, and has an AdamW
    of its own. (The scripts published later buffer 64 and have no entropy bonus.)
    """
    common = common.or_else(expert_weight=1.0)
    size("buffer_size", buffer_size)
    return Method(
        name="relift",
        micro_groups=unguided(num_own),
        select=partial(
            selection.buffer_unsolved,
            buffer_size=buffer_size,
            learning_rate_scale=sft_learning_rate_scale,
            advantages=common.advantages(selection.advantages_over_group),
        ),
        terms=(
            *common.own_terms(),
            terms.cross_entropy(common.weight, common.normalize_by("token_mean")),
            terms.entropy_bonus(expert_entropy_weight, terms.EXPERT),
        ),
        optimizers=("main", "buffer"),
        buffer_size=buffer_size,
        source="ReLIFT, arXiv 2506.07527, relift/trainer.py",
        published={"train.problems_per_step": 128, "train.learning_rate": 1e-6},
        notes=("own and expert tokens are never in one update; each kind has its optimiser state",),
        **common.of_method(),
    )


def hpt(
    common: Common, *, num_own: int = 8, gate: float = 0, max_applied_grad_norm: float = 80.0
) -> Method:
    """HPT: a problem that the policy cannot solve is learnt from its expert, any other by RL.

    `mix_trainer.py` of its code (`select_on_off_ada_balance`, `unify_strategy=switch`); gate 0 for Qwen, 2 for Llama; SFT
    coefficient 1.0, 0.3 for models of 1.5B.
    """
    common = common.or_else(expert_weight=1.0)
    return Method(
        name="hpt",
        micro_groups=unguided(num_own),
        select=partial(
            selection.expert_instead_of_unsolved,
            gate=gate,
            advantages=common.advantages(selection.advantages_over_group),
        ),
        terms=(
            *common.own_terms(),
            terms.cross_entropy(common.weight, common.normalize_by("token_mean")),
        ),
        max_applied_grad_norm=max_applied_grad_norm,
        source="HPT, arXiv 2509.04419, mix_trainer.py",
        published={"train.learning_rate": 5e-6},
        notes=(
            "a problem solved `gate` times or less trains one expert, and no rollout of its own",
        ),
        **common.of_method(),
    )


def srft(
    common: Common, *, num_own: int = 7, gamma: float = 0.1, success_weight: float = 0.1
) -> Method:
    """SRFT: SFT and RL in one, each weighted by the policy's entropy over the row, as ported by HPT.

    `mix_core_algos.py` (`compute_token_on_off_policy_srft_loss`, `srft_type="paper"`), without its clipping of log-probabilities.
    """
    common = common.or_else(expert_weight=0.5)
    normalizer = common.normalize_by("constant_mean")
    advantages = common.advantages(selection.advantages_over_group)
    return Method(
        name="srft",
        micro_groups=own_and_expert(num_own),
        select=partial(
            selection.train_all, advantages=partial(selection.signs_for_own, advantages=advantages)
        ),
        terms=(
            terms.own_successes(success_weight, normalizer),
            terms.own_failures(1.0, normalizer),
            *common.own_extras(),
            terms.confident_cross_entropy(common.weight, common.normalize_by("token_mean")),
            terms.shaped_policy_gradient(gamma, 1.0, normalizer),
        ),
        source="SRFT, arXiv 2506.19767, as ported by HPT (srft_type=paper)",
        notes=("an own row's advantage is the sign of its reward; the expert's is over all rows",),
        **common.of_method(),
    )


def chord(
    common: Common,
    *,
    num_own: int = 8,
    expert_rows_per_own: float = 4.0,
    mu_peak: float = 0.9,
    mu_valley: float = 0.05,
    mu_warmup_steps: int = 0,
    mu_decay_steps: int = 200,
) -> Method:
    """CHORD-mu: SFT on an expert batch of its own beside clipped GRPO, whose share grows.

    `chord_policy_loss.py` of Trinity-RFT; mu counts the run's steps.
    """
    mu = Mu(mu_peak, mu_valley, mu_warmup_steps, mu_decay_steps)
    weight = Schedule(mu, "mu: warm-up to mu_peak, then along a cosine to mu_valley")
    cross_entropy = terms.cross_entropy(
        times(common.expert_weight, weight), common.normalize_by("token_mean")
    )
    rest = Schedule(lambda moment: 1.0 - mu(moment), "1 - mu")
    return _chord(common, cross_entropy, rest, num_own, expert_rows_per_own, "CHORD-mu")


def chord_phi(
    common: Common, *, num_own: int = 8, expert_rows_per_own: float = 4.0, mu: float = 0.1
) -> Method:
    """CHORD-phi: as CHORD-mu, mu constant, and the SFT weighted by p (1 - p)."""
    expert_weight = 1.0 if common.expert_weight is None else common.expert_weight
    cross_entropy = terms.variance_weighted_cross_entropy(
        mu * expert_weight, common.normalize_by("token_mean")
    )
    return _chord(common, cross_entropy, 1.0 - mu, num_own, expert_rows_per_own, "CHORD-phi")


def _chord(
    common: Common,
    cross_entropy: Term,
    own_weight: terms.Weight,
    num_own: int,
    expert_rows_per_own: float,
    name: str,
) -> Method:
    common = common.or_else(clip_low=0.2, clip_high=0.2, scale_by_std=True)
    return Method(
        name=name,
        micro_groups=unguided(num_own),
        select=partial(
            selection.train_all_beside_experts,
            advantages=common.advantages(selection.advantages_over_group),
        ),
        terms=(*common.own_terms("token_mean", weight=own_weight), cross_entropy),
        extra_rows_per_problem=round(num_own * expert_rows_per_own),
        source=f"{name}, arXiv 2508.11408, Trinity-RFT, chord_policy_loss.py",
        published={"own rows a step": 64, "expert rows a step": 256},
        notes=("the expert rows are of problems drawn beside the step's own",),
        **common.of_method(),
    )


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


def uft(
    common: Common,
    *,
    num_own: int = 8,
    hint_slices: int = 5,
    hint_high: float = 0.95,
    hint_low: float = 0.05,
    hint_steps: int = 300,
) -> Method:
    """UFT: all rollouts of a problem start from a hint, whose length falls; the hint is trained a little.

    `rl_dataset.py` and `run.py` of its code: q goes from 0.95 to 0.05 over 300 steps, no hints after that.
    Slices are of tokens here, of sentences there; a whole hint is the whole solution, and nothing is sampled.
    """
    common = common.or_else(
        expert_weight=0.001, clip_low=0.2, clip_high=0.2, kl_weight=0.001, scale_by_std=True
    )
    for name, value in (("hint_high", hint_high), ("hint_low", hint_low)):
        share(name, value)
    return Method(
        name="uft",
        micro_groups=(MicroGroup(num_own, 1.0, ALWAYS),),
        vary=BinomialHints(hint_slices, hint_high, hint_low, hint_steps),
        select=partial(
            selection.train_all, advantages=common.advantages(selection.advantages_over_group)
        ),
        terms=(
            *common.own_terms("token_mean"),
            terms.cross_entropy(common.weight, common.normalize_by("token_mean")),
        ),
        source="UFT, arXiv 2505.16984, rl_dataset.py",
        published={"train.problems_per_step": 256, "train.learning_rate": 1e-6},
        notes=(
            "hint: Binomial(hint_slices, q) slices, q along a cosine over hint_steps, then none",
        ),
        **common.of_method(),
    )


def prefix_rft(
    common: Common,
    *,
    num_own: int = 7,
    prefix_start: float = 0.95,
    prefix_end: float = 0.05,
    top_entropy_share: float = 0.2,
) -> Method:
    """Prefix-RFT: one rollout of a group starts from a prefix, of which the uncertain tokens get the policy gradient.

    From secondary descriptions alone (they disagree on whether the prefix's length is drawn at random below the
    cosine; here it is the cosine).
    """
    common = common.or_else(expert_weight=1.0)
    for name, value in (("prefix_start", prefix_start), ("prefix_end", prefix_end)):
        share(name, value)
    return Method(
        name="prefix_rft",
        micro_groups=(*unguided(num_own), MicroGroup(1, prefix_start, ALWAYS)),
        vary=CosinePrefix(prefix_start, prefix_end),
        select=partial(
            selection.train_all, advantages=common.advantages(selection.advantages_over_group)
        ),
        terms=(
            *common.own_terms(),
            terms.uncertain_prefix_policy_gradient(
                share("top_entropy_share", top_entropy_share),
                common.weight,
                common.normalize_by("constant_mean"),
            ),
        ),
        source="Prefix-RFT, arXiv 2507.01679, from secondary descriptions",
        notes=("the prefix's share of the solution falls along a cosine over the run",),
        **common.of_method(),
    )


METHODS: dict[str, Callable[..., Method]] = {
    build.__name__: build
    for build in (
        trapo,
        trapo_plus,
        grpo,
        sft,
        sft_then_grpo,
        micro_group_grpo,
        micro_group_sft,
        micro_group_luffy,
        luffy,
        rl_plus_sft,
        relift,
        hpt,
        srft,
        chord,
        chord_phi,
        uft,
        prefix_rft,
    )
}
