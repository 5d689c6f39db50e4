"""Builds a method from its name or import path and its hyperparameters."""

import dataclasses
import difflib
import json
from typing import Any, NamedTuple

import pydantic

from trapo_jax.inputs.files import reason_of
from trapo_jax.inputs.import_path import import_object, suggest
from trapo_jax.methods.family import METHODS
from trapo_jax.methods.hyperparameters import Hyperparameters
from trapo_jax.methods.method import Method
from trapo_jax.types import UserError


def make_method(name: str, **hyperparameters: Any) -> Method:
    """Builds a method.

    Args:
      name: a key of `METHODS`, or the import path `package.module:name` of a subclass of `Hyperparameters`, a `Method`,
        or a function without arguments that returns a `Method`.
      **hyperparameters: values that differ from the method's defaults.

    Raises:
      UserError: if the name or a hyperparameter is unknown, a value is out of range, or the user's code fails.
    """
    values = read_hyperparameters(name, hyperparameters)
    made = import_object(name, "method.name") if values is None else values.make
    try:
        method = made() if callable(made) else made
    except UserError:
        raise
    except Exception as error:  # user code
        raise UserError(
            f"method.name={name}: building the method failed ({type(error).__name__}: {reason_of(error)})"
        ) from error
    if isinstance(method, Method) and values is not None:
        return dataclasses.replace(method, name=name, hyperparameters=values.resolved())
    if not isinstance(method, Method):
        raise UserError(
            f"method.name={name}: expected a Method, a subclass of Hyperparameters, or a function that returns a "
            f"Method; got an object of type {type(method).__name__}"
        )
    return method


def read_hyperparameters(name: str, given: dict[str, Any]) -> Hyperparameters | None:
    """Returns the validated hyperparameters of a method, or None for a user-defined method without hyperparameters.

    Raises:
      UserError: if hyperparameters are unknown or invalid. The error has one line per mistake.
    """
    found = find_method(name)
    if not (isinstance(found, type) and issubclass(found, Hyperparameters)):
        if given:
            raise UserError(f"method.{next(iter(given))}: {name} has no hyperparameters")
        return None
    if "name" in found.model_fields:
        raise UserError(
            f"method.name={name}: the class has a hyperparameter 'name', but method.name selects the method; rename it"
        )
    try:
        # Strict JSON mode rejects "3" for 3 and true for 1, but accepts lists for tuples, which YAML does not have.
        return found.model_validate_json(json.dumps(given), strict=True)
    except pydantic.ValidationError as error:
        names = list(found.model_fields)
        # One mistake can cause several errors in the same field.
        first = {e["loc"][0]: e for e in reversed(error.errors())}
        lines = [_explain(name, names, e) for e in reversed(first.values())]
        raise UserError(*lines) from error


def hyperparameter_names(name: Any) -> list[str]:
    """Returns the names of a method's hyperparameters; [] if the method is unknown or has no hyperparameters."""
    if not isinstance(name, str):
        return []
    found = find_method(name) if ":" in name else METHODS.get(name)
    if isinstance(found, type) and issubclass(found, Hyperparameters):
        return list(found.model_fields)
    return []


class HyperparameterHelp(NamedTuple):
    """A hyperparameter of one or more methods.

    Attributes:
      name: the hyperparameter's name.
      annotation: the type annotation.
      sentence: the help text.
      defaults: the default value in each method with this hyperparameter, keyed by method name.
    """

    name: str
    annotation: Any
    sentence: str | None
    defaults: dict[str, Any]


def list_hyperparameters() -> list[HyperparameterHelp]:
    """Returns the hyperparameters of all built-in methods."""
    hyperparameters: dict[str, HyperparameterHelp] = {}
    for method, kind in METHODS.items():
        for name, field in kind.model_fields.items():
            new = HyperparameterHelp(name, field.annotation, field.description, {})
            hyperparameters.setdefault(name, new).defaults[method] = field.default
    return list(hyperparameters.values())


def find_method(name: str) -> Any:
    """Returns the object that a method's name or import path refers to.

    Raises:
      UserError: if there is no such method.
    """
    if ":" in name:
        return import_object(name, "method.name")
    if name not in METHODS:
        raise UserError(f"method.name={name!r}: no such method; {suggest(name, METHODS)}")
    return METHODS[name]


def _explain(method: str, names: list[str], error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    value = json.dumps(error["input"], default=str)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, names, n=1)
        known = f"did you mean {close[0]}?" if close else f"available: {', '.join(names) or 'none'}"
        return f"method.{field}={value}: {method} has no such hyperparameter; {known}"
    return f"method.{field}={value}: {error['msg'][0].lower()}{error['msg'][1:]}"
