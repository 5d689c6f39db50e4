"""A method in words: what `python -m trapo_jax.train --print-method` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from trapo_jax.methods.common import PRESETS
from trapo_jax.methods.family import METHODS
from trapo_jax.methods.guidance import ALWAYS, NEVER
from trapo_jax.methods.make import constants_of, has_presets
from trapo_jax.methods.method import Method, Normalizer, Schedule, Term
from trapo_jax.types import MicroGroup, TokenKind

TOKENS = {TokenKind.COMPLETION: "own tokens", TokenKind.EXPERT_TRAINED: "expert tokens"}
DENOMINATORS: dict[Normalizer, str] = {
    "token_mean": "number of such tokens in the batch",
    "sequence_mean": "such tokens of the rollout, then by the number of rollouts that have any",
    "constant_sum": "max_completion_length",
    "constant_mean": "max_completion_length * rows of the batch",
}


def describe(method: Method) -> str:
    """The resolved formulas, weights, normalisers, guidance, constants and source."""
    lines = [f"{method.name}: {method.source}", "", "objective, the sum of"]
    for term in method.terms:
        lines += _describe_term(term)
    varies = " (varies, see the note)" if method.guidance_varies else ""
    lines += ["", f"guidance, {method.group_size} rollouts a problem at most{varies}"]
    lines += [f"  {_describe_group(group)}" for group in method.micro_groups]
    lines += [f"  prefix boundary: {method.prefix_boundary}"]
    if method.second_expert_last:
        lines.append("  the last micro-group uses the second expert where there is one")
    if method.extra_rows_per_problem:
        lines.append(f"  beside each problem {method.extra_rows_per_problem} rows of other experts")
    if method.notes:
        lines += ["", *(f"note: {note}" for note in method.notes)]
    shared = {"alpha": method.alpha, "clip_low": method.clip_low, "clip_high": method.clip_high}
    lines += ["", *_table("shared constants (method)", shared)]
    lines += _table("constants of its own (method.constants)", method.constants)
    lines += _table("published settings, not set by the method", method.published)
    if len(method.optimizers) > 1:
        lines.append(f"optimiser states: {', '.join(method.optimizers)}")
    if method.name in METHODS and has_presets(method.name):
        lines += ["", *_preset_differences(method.name)]
    return "\n".join(lines)


def _describe_term(term: Term) -> list[str]:
    weight = term.weight.formula if isinstance(term.weight, Schedule) else f"{term.weight:g}"
    return [
        f"  {term.name}, on {TOKENS.get(term.kind, term.kind.name)}",
        f"    {term.formula}",
        f"    weight {weight}; divided by {DENOMINATORS[term.normalizer]} ({term.normalizer})",
    ]


def _describe_group(group: MicroGroup) -> str:
    rollouts = f"{group.size} rollout{'s' if group.size > 1 else ''}"
    if group.ratio == 0 or group.threshold <= NEVER:
        return f"{rollouts} unguided"
    start = "the whole expert" if group.ratio == 1 else f"{group.ratio:g} of the expert"
    if group.threshold >= ALWAYS:
        return f"{rollouts} from {start}"
    return f"{rollouts} from {start} if the mean reward so far is below {group.threshold:g}"


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"  {name} = {_short(value)}" for name, value in values.items()]
    return [title, *rows] if rows else []


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _preset_differences(name: str) -> list[str]:
    lines = ["presets (method.preset)"]
    by_preset = {preset: constants_of(name, preset) for preset in PRESETS}
    for constant in next(iter(by_preset.values())):
        values = {preset: constants[constant] for preset, constants in by_preset.items()}
        if len(set(map(str, values.values()))) > 1:
            lines += [f"  {constant}", *(f"    {p}: {_short(v)}" for p, v in values.items())]
    return lines


def fingerprint(method: Method) -> dict[str, Any]:
    """Returns what identifies a method."""
    return {"name": method.name}
