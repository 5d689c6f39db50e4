"""TRAPO; the ablations of its Table 2: its guidance with another loss on the expert's tokens, or none; TRAPO changed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trapo_jax.methods import selection, terms
from trapo_jax.methods.common import Common, MicroGroupTable, as_micro_groups, share, size
from trapo_jax.methods.guidance import NEVER
from trapo_jax.methods.method import Method, Term
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


def trapo_plus(common: Common, *, num_own: int = 7, threshold: float = 0.5) -> Method:
    """TRAPO that takes the expert whole or not at all, and trains only what says something.

    `num_own` unguided rollouts; where their mean reward is below `threshold`, the expert's whole solution as
    one more. Rollouts without an advantage or a prefix are left out, of the mean over rollouts too: a step on
    problems that are solved costs no trained tokens, so a run with a budget of these takes more steps.
    """
    common = common.or_else(expert_weight=1.0)
    normalizer = common.normalize_by("constant_mean")
    return _micro_grouped(
        common,
        (terms.trsft(common.alpha, common.weight, normalizer),),
        micro_groups=(
            (size("num_own", num_own), 0.0, NEVER),
            (1, 1.0, share("threshold", threshold)),
        ),
        prefix_boundary="exact",
        second_expert_last=False,
        source="TRAPO, arXiv 2512.17636, changed by this project: docs/comparison.md",
        select=selection.train_signal,
    )


def _micro_grouped(
    common: Common,
    expert_terms: Sequence[Term],
    *,
    micro_groups: MicroGroupTable,
    prefix_boundary: Any,
    second_expert_last: bool,
    source: str,
    select: Callable[..., selection.Selection] = selection.train_all,
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
            select,
            advantages=common.advantages(selection.advantages_over_group),
            carriers=carriers,
        ),
        terms=(*common.own_terms(), *expert_terms),
        source=source,
        **common.of_method(),
    )
