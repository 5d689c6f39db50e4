"""Lists the built-in methods in `METHODS`. Each is a class of hyperparameters that builds a `Method`.

If a method's source code was consulted, its class docstring names the file. The other methods follow the project's
design document, which was not checked against the source. Published settings that belong to other sections of the
config (learning rate, problems per step) are stored in `Method.published`; they are printed but not applied.

Differences from the papers:

- Token losses are divided by the number of rows times max_completion_length (`constant_mean`) if the source divides the
  sum by a constant or does not specify the normalizer. With this normalizer, a token's weight does not depend on the
  lengths of other rows in the batch. SFT losses are divided by the number of trained tokens in the whole batch, not in
  a micro-batch.
- As in TRAPO, advantages are not divided by the group's standard deviation. The exceptions are CHORD and UFT, whose
  released code divides by it.
- Among rollouts that start from the same expert prefix, only one has a loss on the prefix.
"""

from collections.abc import Mapping
from functools import partial

from trapo_jax.methods import selection, terms
from trapo_jax.methods.guidance import (
    unguided,
    whole_expert,
)
from trapo_jax.methods.hyperparameters import (
    Count,
    ExpertHyperparameters,
    Hyperparameters,
    PolicyGradientHyperparameters,
)
from trapo_jax.methods.method import Method
from trapo_jax.methods.micro_grouped import (
    MicroGroupGrpo,
    MicroGroupLuffy,
    MicroGroupSft,
    Trapo,
    TrapoPlus,
)
from trapo_jax.methods.mixed import Hpt, Luffy, Relift, RlPlusSft, Srft
from trapo_jax.methods.scheduled import Chord, ChordPhi, PrefixRft, SftThenGrpo, Uft


class Sft(ExpertHyperparameters):
    """Supervised fine-tuning on expert solutions; nothing is sampled."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=whole_expert(),
            select=partial(selection.train_all, advantages=selection.no_advantages),
            terms=(terms.cross_entropy(self.expert_weight, self.normalize_by("token_mean")),),
            source="supervised fine-tuning on expert solutions",
        )


class Grpo(PolicyGradientHyperparameters):
    """GRPO as in the TRAPO paper's comparison: the same train step without guidance."""

    num_rollouts: Count = 8
    """Rollouts per problem."""

    def make(self) -> Method:
        return Method(
            name="",
            micro_groups=unguided(self.num_rollouts),
            terms=self.completion_terms(),
            source="GRPO as in TRAPO's comparison, arXiv 2512.17636, Table 1",
            select=self.selecting(
                partial(
                    selection.train_all, advantages=self.advantages(selection.advantages_over_group)
                )
            ),
            **self.method_fields(),
        )


METHODS: Mapping[str, type[Hyperparameters]] = {
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
