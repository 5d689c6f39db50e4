"""Lists the fields of a configuration and formats the `--help` text of the commands."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_origin

import pydantic
import yaml

from trapo_jax.config.schema import MethodConfig
from trapo_jax.config.tasks import TASKS
from trapo_jax.methods import list_hyperparameters
from trapo_jax.types import UserError

# The fields that `--help` describes; `--help all` describes all fields.
COMMON_FIELDS = (
    "output_dir",
    "seed",
    "model.path",
    "lora.rank",
    "data.source",
    "data.train_files",
    "data.test_files",
    "data.template",
    "data.prompt_suffix",
    "method.name",
    "rewards.functions",
    "sampling.max_completion_length",
    "train.num_steps",
    "train.problems_per_step",
    "train.learning_rate",
    "evaluation.every",
    "evaluation.num_samples",
    "evaluation.temperature",
    "checkpoint.every",
)
HELP, ALL = ("--help", "-h"), "all"
MAX_WIDTH = 120

USAGE = """\
usage: python -m trapo_jax.{command} [--config FILE] [FIELD=VALUE ...]

{about}

  --config FILE     a YAML file, or the name of a shipped config (smoke_cpu, own_data, ...); without this option, the
                    defaults below apply. Relative paths of models and data, and modules of your own functions, are
                    looked up in the working directory, then in the folder of this file
{options}  FIELD=VALUE       overrides a field; may also be written as --FIELD VALUE or --FIELD=VALUE
  --help [TOPIC]    prints the most common fields, or those of a topic: a section, a field, or all
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


def list_sections(config_class: type[pydantic.BaseModel]) -> dict[str, str]:
    """Returns the description of each section of a configuration, keyed by name."""
    return {
        name: field.description or ""
        for name, field in config_class.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
    }


def help_if_requested(
    arguments: Sequence[str],
    config_class: type[pydantic.BaseModel],
    command: str,
    about: str,
    *,
    options: str = "",
) -> str | None:
    """Returns the help text if the arguments contain `--help`, otherwise None.

    Without a topic, the text has the usage, the common fields, and the sections. With a topic, which may follow
    `--help`, it has the fields of a section, the fields whose names start with the topic, or all fields.

    Args:
      arguments: the arguments of the command.
      config_class: the class of the command's configuration.
      command: the command's name.
      about: a sentence that describes the command.
      options: help lines of the command's other options, each ending with a newline.

    Raises:
      UserError: if there is no such topic.
    """
    position = next((i for i, argument in enumerate(arguments) if argument in HELP), None)
    if position is None:
        return None
    topic = next(iter(arguments[position + 1 :]), "")
    if topic.startswith("-") or "=" in topic:
        topic = ""
    fields = list(list_fields(config_class))
    if topic:
        return _help_on(topic, fields, config_class)
    width = min(shutil.get_terminal_size((MAX_WIDTH, 0)).columns, MAX_WIDTH)
    common = [field for field in fields if field.name in COMMON_FIELDS]
    sections = list_sections(config_class)
    title = max(map(len, sections)) + 2
    lines = [USAGE.format(command=command, about=about, options=options)]
    lines += ["Common fields (type, default):", "", *map(_describe, common), ""]
    lines += [
        f"Sections ({len(fields)} fields in total; --help SECTION lists those of a section):",
        "",
    ]
    for name, description in sections.items():
        lines += textwrap.wrap(
            f"{name:{title}}{description}",
            width,
            initial_indent="  ",
            subsequent_indent=" " * (title + 2),
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _help_on(
    topic: str, fields: Sequence[FieldHelp], config_class: type[pydantic.BaseModel]
) -> str:
    """Returns the help texts of the fields that a topic selects."""
    selected = [
        field for field in fields if topic == ALL or f"{field.name}.".startswith(f"{topic}.")
    ]
    if not selected:
        topics = [ALL, *list_sections(config_class), *(field.name for field in fields)]
        close = difflib.get_close_matches(topic, topics, n=1)
        hint = f"did you mean {close[0]}?" if close else "pass a section, a field, or all"
        raise UserError(f"command line: --help {topic}: no such topic; {hint}")
    return "\n".join(map(_describe, selected))


def _describe(field: FieldHelp) -> str:
    width = min(shutil.get_terminal_size((MAX_WIDTH, 0)).columns, MAX_WIDTH)
    sentence = textwrap.fill(
        field.sentence or "",
        width,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"  {field.name}  ({field.type}, {field.default})\n{sentence}"


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
