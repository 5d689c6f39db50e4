"""TRAPO, and the ablations of its Table 2: its guidance with another loss on the expert's tokens, or none."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from trapo_jax.methods import selection, terms
from trapo_jax.methods.common import Common, MicroGroupTable, as_micro_groups, share
from trapo_jax.methods.method import Method, Schedule, Term
from trapo_jax.types import UserError


def trapo(
    common: Common,
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
) -> Method:
    """TRAPO: micro-groups, and TrSFT on the expert's tokens (Sections 3.1 to 3.3, Table 5)."""
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    return _micro_grouped(
        common,
        (terms.trsft(common.alpha, common.weight, normalizer),),
        micro_groups=micro_groups,
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        source="TRAPO, arXiv 2512.17636",
    )


def micro_group_grpo(
    common: Common,
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
) -> Method:
    """TRAPO's guidance alone: the expert's tokens are context."""
    return _micro_grouped(
        common,
        (),
        micro_groups=micro_groups,
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        source="micro-groups alone, an ablation of arXiv 2512.17636, Table 2",
    )


def micro_group_sft(
    common: Common,
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
) -> Method:
    """TRAPO's guidance with plain cross-entropy on the expert's tokens."""
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    return _micro_grouped(
        common,
        (terms.cross_entropy(common.weight, normalizer),),
        micro_groups=micro_groups,
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        source="micro-groups and plain SFT loss, an ablation of arXiv 2512.17636, Table 2",
    )


def micro_group_luffy(
    common: Common,
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
    gamma: float = 0.1,
) -> Method:
    """TRAPO's guidance with LUFFY's loss on the expert's tokens, by the advantage of the row that carries them."""
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    return _micro_grouped(
        common,
        (terms.shaped_policy_gradient(gamma, common.weight, normalizer),),
        micro_groups=micro_groups,
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        source="micro-groups and LUFFY's loss, an ablation of arXiv 2512.17636, Table 2",
    )


def trapo_plus(
    common: Common,
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
    baseline: str = "group",
    final_expert_share: float = 1.0,
    drop_without_signal: bool = False,
) -> Method:
    """TRAPO with ideas of our own, each by a constant."""
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    fall = share("final_expert_share", final_expert_share) - 1
    weight = common.weight
    if fall:
        weight = Schedule(
            lambda moment: common.weight * (1 + fall * min(1.0, moment.progress)),
            f"{common.weight:g} * (1 {fall:+g} * progress)",
        )
    over = {
        "group": selection.advantages_over_group,
        "guidance": selection.advantages_over_equally_guided,
    }
    if baseline not in over:
        raise UserError(f"method.constants.baseline={baseline!r}: give group or guidance")
    method = _micro_grouped(
        common,
        (terms.trsft(common.alpha, weight, normalizer),),
        micro_groups=micro_groups,
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        source="TRAPO, arXiv 2512.17636, with changes of this project",
    )
    advantages = common.advantages(over[baseline])
    select = partial(
        selection.train_all, advantages=advantages, carriers=selection.first_of_each_prefix
    )
    if drop_without_signal:
        select = partial(selection.train_signal, advantages=advantages)
    return dataclasses.replace(method, select=select)


def _micro_grouped(
    common: Common,
    expert_terms: Sequence[Term],
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: str,
    second_expert_last: bool,
    source: str,
) -> Method:
    """TRAPO's guidance with some loss on the expert's tokens."""
    carriers = selection.first_of_each_prefix if expert_terms else selection.no_prefix
    if prefix_boundary not in ("exact", "paragraph"):
        raise UserError(
            f"method.constants.prefix_boundary={prefix_boundary!r}: give exact or paragraph"
        )
    return Method(
        name="",
        micro_groups=as_micro_groups(micro_groups),
        prefix_boundary=prefix_boundary,
        second_expert_last=second_expert_last,
        select=partial(
            selection.train_all,
            advantages=common.advantages(selection.advantages_over_group),
            carriers=carriers,
        ),
        terms=(*common.own_terms(), *expert_terms),
        source=source,
        **common.of_method(),
    )
