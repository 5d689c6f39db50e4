"""Lists the fields of a configuration and formats the `--help` text of the commands."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

import pydantic
import yaml

from trapo_jax.config.schema import MethodConfig
from trapo_jax.config.tasks import TASKS
from trapo_jax.methods import list_hyperparameters

USAGE = """\
usage: python -m trapo_jax.{command} [--config FILE] [FIELD=VALUE ...]

{about}

  --config FILE     a YAML file, or the name of a shipped config (smoke_cpu, own_data, ...); without this option, the
                    defaults below apply. Relative paths of models and data, and modules of your own functions, are
                    looked up in the working directory, then in the folder of this file
{options}  FIELD=VALUE       overrides a field; may also be written as --FIELD VALUE or --FIELD=VALUE
  --help            prints this text

Fields (type, default):
"""


class FieldHelp(NamedTuple):
    """Describes a field: its dotted name, its type, its default as YAML, and its help text."""

    name: str
    type: str
    default: str
    sentence: str | None


def list_fields(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[FieldHelp]:
    """Yields every field of a configuration class, depth first."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from list_fields(field.annotation, f"{prefix}{name}.")
        else:
            default = _as_yaml(field.default)
            for task, defaults in TASKS.items():
                of_section = defaults.get(prefix.removesuffix("."), {})
                if name in of_section:
                    default += f"; {_as_yaml(of_section[name])} for {task}"
            yield FieldHelp(
                f"{prefix}{name}", _type_name(field.annotation), default, field.description
            )
    if section is MethodConfig:
        yield from _list_hyperparameters(prefix)


def _list_hyperparameters(prefix: str) -> Iterator[FieldHelp]:
    """Yields the hyperparameters of all methods. The default names the methods that each default value applies to."""
    for hyperparameter in list_hyperparameters():
        by_default: dict[str, list[str]] = {}
        for method, default in hyperparameter.defaults.items():
            by_default.setdefault(_as_yaml(default), []).append(method)
        groups = sorted(by_default.items(), key=lambda group: len(group[1]))
        defaults = "; ".join(
            f"{default} for {', '.join(names) if len(names) <= 6 else 'most methods'}"
            for default, names in groups
        )
        yield FieldHelp(
            f"{prefix}{hyperparameter.name}",
            _type_name(hyperparameter.annotation),
            defaults,
            hyperparameter.sentence,
        )


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def help_text(
    config_class: type[pydantic.BaseModel], command: str, about: str, *, options: str = ""
) -> str:
    """Returns the `--help` text: the usage, and every field with its type, default and help text.

    Args:
      config_class: the class of the command's configuration.
      command: the command's name.
      about: a sentence that describes the command.
      options: help lines of the command's other options, each ending with a newline.
    """
    lines = [USAGE.format(command=command, about=about, options=options)]
    for field in list_fields(config_class):
        lines.append(f"  {field.name}  ({field.type}, {field.default})\n      {field.sentence}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    if not arguments:
        return getattr(annotation, "__name__", str(annotation))
    if hasattr(annotation, "__metadata__"):  # Annotated[int, ...]
        return _type_name(arguments[0])
    if get_origin(annotation) in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"mapping from name to {_type_name(arguments[1])}"
    if all(isinstance(argument, str) for argument in arguments):  # Literal["a", "b"]
        return "|".join(arguments)
    return "|".join(_type_name(argument) for argument in arguments)
