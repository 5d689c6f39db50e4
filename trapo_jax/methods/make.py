"""A method by name, with its constants."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from trapo_jax.methods.common import PRESETS, PUBLISHED, Common, Preset
from trapo_jax.methods.family import METHODS
from trapo_jax.methods.method import Method
from trapo_jax.types import UserError


def make_method(
    name: str,
    *,
    preset: Preset = "paper",
    constants: Mapping[str, Any] | None = None,
    **common: Any,
) -> Method:
    """The named method.

    Args:
      name: a key of `METHODS`.
      preset: the guidance of TRAPO and its ablations, as in the paper or as in the released code.
      constants: what differs from the method's own, by the names of `constants_of`.
      **common: what `Common` lists; a method ignores what it has no use for.

    Raises:
      UserError: for a constant that the method does not have, or a value that it cannot have.
    """
    own = constants_of(name, preset)
    given = dict(constants or {})
    for constant, value in given.items():
        _check(name, constant, value, own)
    resolved = {**own, **given}
    method = METHODS[name](Common(**common), **resolved)
    published = PUBLISHED[preset] if has_presets(name) else method.published
    return dataclasses.replace(method, name=name, constants=resolved, published=published)


def constants_of(name: str, preset: Preset = "paper") -> dict[str, Any]:
    """The constants of a method beside those of `Common`, and their values by default."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    own = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: PRESETS[preset].get(p.name, p.default) for p in own}


def has_presets(name: str) -> bool:
    """Whether a method's guidance depends on the preset."""
    return constants_of(name, "paper") != constants_of(name, "reference")


def _check(name: str, constant: str, value: Any, own: Mapping[str, Any]) -> None:
    """The constant exists, and the value is of its kind."""
    where = f"method.constants.{constant}={value!r}"
    if constant not in own:
        close = difflib.get_close_matches(constant, own, n=1)
        there_are = f"did you mean {close[0]}?" if close else f"it has {', '.join(own) or 'none'}"
        raise UserError(f"{where}: {name} has no such constant; {there_are}")
    default = own[constant]
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, int):
        fits = isinstance(value, int)
    elif isinstance(default, float):
        fits = isinstance(value, (int, float))
    else:
        fits = isinstance(value, str) == isinstance(default, str)
    if not fits:
        raise UserError(f"{where}: give something like {default!r}, its default for {name}")
    if isinstance(value, (int, float)) and not value >= 0:
        raise UserError(f"{where}: must not be negative")
