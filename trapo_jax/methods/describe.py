"""Describes methods, for `python -m trapo_jax.train --print-method`, and computes their fingerprints."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from trapo_jax.methods.guidance import ALWAYS, NEVER
from trapo_jax.methods.method import Method, Normalizer, Schedule, Stage, Term
from trapo_jax.methods.micro_grouped import PRESETS
from trapo_jax.types import MicroGroup, TokenKind

TOKENS = {TokenKind.COMPLETION: "completion tokens", TokenKind.EXPERT_TRAINED: "expert tokens"}
DENOMINATORS: dict[Normalizer, str] = {
    "token_mean": "the number of these tokens in the batch",
    "sequence_mean": "the number of these tokens in the rollout, then by the number of rollouts with any such tokens",
    "constant_sum": "max_completion_length",
    "constant_mean": "max_completion_length * the number of rows in the batch",
}


def describe(method: Method) -> str:
    """Describes a method as text: resolved formulas, weights, normalizers, guidance, hyperparameters, and source."""
    lines = [f"{method.name}: {method.source}", "", "objective: the sum of"]
    for term in method.terms:
        lines += _describe_term(term)
    varies = " (varies; see the note)" if method.guidance_varies else ""
    lines += ["", f"guidance: at most {method.group_size} rollouts per problem{varies}"]
    lines += [f"  {_describe_group(group)}" for group in method.micro_groups]
    lines += [f"  prefix boundary: {method.prefix_boundary}"]
    if method.expert_part == "whole":
        lines.append("  expert solution: the whole text, including the answer after the thought")
    if method.second_expert_last:
        lines.append("  the last micro-group uses the second expert solution if there is one")
    if method.always_samples:
        lines.append(
            "  a completion is sampled even after the whole expert solution, which then has no EOS"
        )
    if method.extra_rows_per_problem:
        lines.append(
            f"  {method.extra_rows_per_problem} additional expert rows per problem, from other problems"
        )
    if len(method.stages) > 1:
        lines += ["", "stages, each with its own optimizer state and learning-rate schedule"]
        lines += [f"  {_describe_stage(stage)}" for stage in method.stages]
    if method.notes:
        lines += ["", *(f"note: {note}" for note in method.notes)]
    lines += ["", *_table("hyperparameters (method.NAME=VALUE)", method.hyperparameters)]
    lines += _table("published settings that the method does not set", method.published)
    if len(method.optimizers) > 1:
        lines.append(f"optimizer states: {', '.join(method.optimizers)}")
    if "preset" in method.hyperparameters:
        lines += ["", *_preset_differences()]
    return "\n".join(lines)


def _describe_term(term: Term) -> list[str]:
    weight = term.weight.formula if isinstance(term.weight, Schedule) else f"{term.weight:g}"
    return [
        f"  {term.name}, on {' and '.join(TOKENS.get(kind, kind.name) for kind in term.kinds)}",
        f"    {term.formula}",
        f"    weight {weight}; divided by {DENOMINATORS[term.normalizer]} ({term.normalizer})",
    ]


def _describe_group(group: MicroGroup) -> str:
    rollouts = f"{group.size} rollout{'s' if group.size > 1 else ''}"
    if group.ratio == 0 or group.threshold <= NEVER:
        return f"{rollouts}, unguided"
    share = "the whole" if group.ratio == 1 else f"{group.ratio:g} of the"
    start = f"{share} expert solution"
    if group.threshold >= ALWAYS:
        return f"{rollouts} that start from {start}"
    return (
        f"{rollouts} that start from {start} if the mean reward so far is below {group.threshold:g}"
    )


def _describe_stage(stage: Stage) -> str:
    limits = []
    if stage.share < 1:
        limits.append(f"after {stage.share:g} of the run")
    if stage.num_steps is not None:
        limits.append(f"after {stage.num_steps} steps")
    if stage.patience is not None:
        limits.append(
            f"after {stage.patience} validations without a lower loss on expert solutions"
        )
    return f"{stage.name}: ends {' or '.join(limits) or 'with the run'}"


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"  {name} = {_short(value)}" for name, value in values.items()]
    return [title, *rows] if rows else []


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _preset_differences() -> list[str]:
    lines = ["presets (method.preset)"]
    for hyperparameter in ("micro_groups", "prefix_boundary", "second_expert_last"):
        lines.append(f"  {hyperparameter}")
        lines += [f"    {p}: {_short(getattr(v, hyperparameter))}" for p, v in PRESETS.items()]
    return lines


def fingerprint(method: Method) -> dict[str, Any]:
    """Returns JSON-serializable data that identifies a built-in or user-defined method.

    Two methods with the same fingerprint have the same name, hyperparameters, guidance, selection, and terms. Functions
    are compared by qualified name and bound arguments, and schedules are compared by their formulas.
    """
    return {
        "name": method.name,
        "source": method.source,
        "hyperparameters": {name: _plain(value) for name, value in method.hyperparameters.items()},
        "micro_groups": [list(dataclasses.astuple(group)) for group in method.micro_groups],
        "vary": _qualified_name(method.vary),
        "prefix_boundary": method.prefix_boundary,
        "second_expert_last": method.second_expert_last,
        "always_samples": method.always_samples,
        "expert_part": method.expert_part,
        "select": _qualified_name(method.select),
        "terms": [
            {
                "name": term.name,
                "kinds": [kind.name for kind in term.kinds],
                "formula": term.formula,
                "weight": getattr(term.weight, "formula", term.weight),
                "normalizer": term.normalizer,
                "loss": _qualified_name(term.loss),
            }
            for term in method.terms
        ],
        "stages": [dataclasses.asdict(stage) for stage in method.stages],
        "optimizers": list(method.optimizers),
        "extra_rows_per_problem": method.extra_rows_per_problem,
        "needs_reference": method.needs_reference,
    }


def _plain(value: Any) -> Any:
    """Returns the value after a round trip through JSON."""
    return json.loads(json.dumps(value))


def _qualified_name(function: Any) -> str:
    """Returns the qualified name of a function or callable object, with its bound arguments."""
    if isinstance(function, partial):
        bound = [_qualified_name(x) if callable(x) else repr(x) for x in function.args]
        bound += [
            f"{name}={_qualified_name(x) if callable(x) else repr(x)}"
            for name, x in sorted(function.keywords.items())
        ]
        return f"{_qualified_name(function.func)}({', '.join(bound)})"
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    return repr(function)
