"""Reads configurations from YAML files and `a.b=c` overrides.

The file and the overrides are merged as plain data, which is then validated strictly, in a single pass. Every mistake
is reported in one line with the field, its origin and value, and how to fix the mistake.
"""

import difflib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml

from trapo_jax.config.changes import flatten
from trapo_jax.config.help import COMMON_FIELDS, list_fields
from trapo_jax.config.schema import DATA_FILES, MethodConfig, Section
from trapo_jax.config.training import Config, TaskConfig
from trapo_jax.config.yaml_files import check_plain, parse_yaml, read_yaml, shorten
from trapo_jax.inputs.files import shown
from trapo_jax.inputs.import_path import search_beside
from trapo_jax.inputs.paths import find_config, look_up
from trapo_jax.methods import hyperparameter_names
from trapo_jax.types import UserError

C = TypeVar("C", bound=TaskConfig)

MAX_MISTAKES, MAX_NAME_CHARS = 20, 200  # limits on what error messages show
COMMAND_LINE = "command line"
# A value that starts with one of these is not plain text in YAML, but a quoted string, a list or mapping in brackets,
# an alias, a tag, or the like.
YAML_INDICATORS = ("'", '"', "[", "{", "&", "*", "!", "|", ">", "%", "@", "`")


class Layer(NamedTuple):
    """A part of a configuration as plain data.

    Attributes:
      where: the origin of the data, for error messages.
      data: the values, keyed by field.
    """

    where: str
    data: Mapping[str, Any]


def load_config(
    config_class: type[C],
    file: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> C:
    """Merges a file and overrides, and validates the result.

    Relative paths of models and data, and modules in import paths, are looked up in the working directory and then in
    the folder of the file.

    Args:
      config_class: the class of the configuration.
      file: a YAML file, or None.
      overrides: dotted names and YAML scalars, such as `("train.num_steps", "10")`; they take precedence over the file.
      defaults: plain data that the file is merged into, section by section.

    Raises:
      UserError: if there are mistakes. The message has one line per mistake.
    """
    layers = [Layer("defaults", defaults or {})]
    layers += [Layer(str(file), read_yaml(file))] if file else []
    return load_layers(config_class, layers, overrides, file=file)


def load_layers(
    config_class: type[C],
    layers: Sequence[Layer],
    overrides: Sequence[tuple[str, str]],
    *,
    file: Path | None,
) -> C:
    """Merges layers and overrides, and validates the result. Later layers take precedence over earlier ones.

    Args:
      config_class, overrides: see `load_config`.
      layers: plain data, as from `read_yaml`.
      file: the config file, whose folder is searched for paths and modules.

    Raises:
      UserError: if there are mistakes. The message has one line per mistake.
    """
    search_beside(file)
    text = json.dumps(merge_layers(layers, overrides), default=str)
    try:
        # Strict JSON mode rejects "3" for 3 and true for 1, but accepts the lists and mappings that YAML produces.
        config = config_class.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        given = [*layers, Layer(COMMAND_LINE, dict(overrides))]
        where = str(file or COMMAND_LINE)  # shown as the origin of fields that are not set anywhere
        mistakes = error.errors()
        lines = [
            line
            for mistake in mistakes[:MAX_MISTAKES]
            for line in _explain(mistake, config_class, given, otherwise=where)
        ]
        if num_more := len(mistakes[MAX_MISTAKES:]):
            lines.append(f"and {num_more} more mistakes")
        raise UserError(*lines) from error
    return _look_up_paths(config, file.parent) if file else config


def _look_up_paths(config: C, folder: Path) -> C:
    model = {"path": look_up(config.model.path, folder)}
    data = {
        name: tuple(look_up(entry, folder) for entry in getattr(config.data, name))
        for name in DATA_FILES
    }
    sections = {
        "model": config.model.model_copy(update=model),
        "data": config.data.model_copy(update=data),
    }
    return config.model_copy(update=sections)


def load_train_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Loads the configuration of a training run. `trapo_jax.load_config` is an alias of this function.

    Args:
      path: a YAML file, or the name of a shipped config such as `smoke_cpu`; None for the defaults.
      overrides: values keyed by dotted name, such as `{"train.num_steps": 10}`; they take precedence over the file.

    Raises:
      UserError: if there are mistakes. The message has one line per mistake.

    >>> load_train_config(overrides={"train.num_steps": 10}).train.num_steps
    10
    """
    texts = [(name, json.dumps(value)) for name, value in (overrides or {}).items()]
    return load_config(Config, find_config(path) if path is not None else None, texts)


def merge_layers(layers: Sequence[Layer], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merges layers and overrides into plain data without validating it; see `load_layers`."""
    data: dict[str, Any] = {}
    for layer in layers:
        data = _merge(data, layer.data)
    values = [(name, _parse_scalar(name, text)) for name, text in overrides]
    _drop_hyperparameters_of_another_method(data, dict(values).get("method.name"))
    for name, value in values:
        _set_field(data, name, value, layers)
    return data


def parse_command_line(arguments: Sequence[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """Splits a command line into the config file and the overrides, in order.

    Raises:
      UserError: if an argument is neither an option nor an override.
    """
    file: Path | None = None
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        is_option = argument.startswith("--")
        name, equals, value = argument.removeprefix("--").partition("=")
        if not is_option and not equals:
            hint = _command_line_hint(argument, overrides, rest)
            raise UserError(f"{COMMAND_LINE}: {argument!r} is not FIELD=VALUE{hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(
                    f"{COMMAND_LINE}: --{name} is not an option without a value; to set a field, write "
                    "--FIELD=VALUE; --help lists all options and fields"
                )
            value = rest.pop(0)
        if not name:
            raise UserError(f"{COMMAND_LINE}: {argument!r} has no field name")
        if is_option and name == "config":
            if file is not None:
                raise UserError(f"{COMMAND_LINE}: two --config files, {file} and {value}; pass one")
            file = find_config(value)
        else:
            overrides.append((name, value))
    return file, overrides


def _command_line_hint(
    argument: str, previous: Sequence[tuple[str, str]], following: Sequence[str]
) -> str:
    """Returns a hint for an argument without `=`, given the overrides before it and the arguments after it."""
    if following[:1] == ["="]:
        return f"; write {argument}={' '.join(following[1:2])} without spaces"
    if previous:
        name, value = previous[-1]
        if not value:
            return f"; write {name}={argument} without spaces"
        if value.count("[") + value.count("{") > value.count("]") + value.count("}"):
            return f"; put {name}={value} {argument} in quotation marks, because it contains spaces"
    if Path(argument).is_dir():
        return f"; did you mean model.path={argument}?"
    return f"; did you mean --config {argument}?" if argument.endswith(".yaml") else ""


def _parse_scalar(name: str, text: str) -> Any:
    """Parses an override's value as YAML, but keeps text that YAML would parse as a block, such as `a: b`, as text."""
    if len(name) > MAX_NAME_CHARS:
        raise UserError(f"{COMMAND_LINE}: {shown(name)}: a name with {len(name)} characters")
    check_plain(name, f"{COMMAND_LINE}: {shown(name)}")
    is_flow = text.lstrip().startswith(YAML_INDICATORS)
    try:
        value = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        if is_flow or ": " not in text:
            raise UserError(
                f"{COMMAND_LINE}: {name}={text!r:.200}: not a valid YAML value ({error.problem}); text with special "
                "characters needs quotation marks inside the shell's"
            ) from error
        value = text
    check_plain(value, f"{COMMAND_LINE}: {name}")
    is_block = isinstance(value, dict | list) and not is_flow
    is_commented = (value is None or isinstance(value, str)) and not is_flow and "#" in text
    # In an override, # does not start a comment.
    return text.strip() if is_block or is_commented else value


def as_override(field: str, value: Any) -> str:
    """Returns `field=value`, quoted for the shell. Parsing this override yields the same value.

    >>> print(as_override("data.prompt_suffix", "End with: N"), as_override("train.decay_start", None))
    'data.prompt_suffix=End with: N' train.decay_start=null
    """
    text = value if isinstance(value, str) else ""
    try:
        is_literal = isinstance(value, str) and _parse_scalar(field, text) == value
    except UserError:
        is_literal = False
    return shlex.quote(f"{field}={text if is_literal else json.dumps(value)}")


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of `first` updated with `second`, section by section."""
    merged = {}
    for name in {**first, **second}:
        old, new = first.get(name), second.get(name, first.get(name))
        if isinstance(new, Mapping):
            new = _merge(old if isinstance(old, Mapping) else {}, new)
        merged[name] = new
    return merged


def _drop_hyperparameters_of_another_method(data: dict[str, Any], name: Any) -> None:
    """Drops the hyperparameters in the file that the method chosen on the command line does not have."""
    section = data.get("method")
    if not isinstance(section, dict) or not isinstance(name, str):
        return
    of_file = section.get("name", MethodConfig.model_fields["name"].default)
    dropped = {*hyperparameter_names(of_file)} - {*hyperparameter_names(name)}
    data["method"] = {field: value for field, value in section.items() if field not in dropped}


def _set_field(data: dict[str, Any], name: str, value: Any, layers: Sequence[Layer]) -> None:
    *sections, leaf = name.split(".")
    for i, section in enumerate(sections, start=1):
        inner = data.setdefault(section, {})
        if inner is None:
            inner = data[section] = {}
        if not isinstance(inner, dict):
            field = ".".join(sections[:i])
            raise UserError(
                f"{_origin(layers, [field]) or COMMAND_LINE}: {field}={shorten(inner)}: not a section of fields, but "
                f"the command line sets {name}"
            )
        data = inner
    data[leaf] = value


def _explain(
    error: Any, config_class: type[TaskConfig], layers: Sequence[Layer], *, otherwise: str
) -> list[str]:
    """Returns one or more lines with the origin, name and value of a field, what is wrong, and how to fix it."""
    name = ".".join(str(part) for part in error["loc"])[:MAX_NAME_CHARS]
    fields = [name]
    if error["type"] == "value_error":  # raised by a check of a section or of several fields
        problem = error["ctx"]["error"]
        cause = problem.__cause__
        lines = cause.lines if isinstance(cause, UserError) else [str(problem)]
        fields = _fields_in(" ".join(lines), config_class) or fields
        where = _origin(layers, fields) or otherwise
        return [f"{where}: {line}" for line in lines]
    if error["type"] == "extra_forbidden":
        text = f"{name}: unknown field{_known_field(config_class, name)}"
    else:
        message = error["msg"][0].lower() + error["msg"][1:]
        text = f"{name}={shorten(error['input'])}: {message}{_hint_for(error, name, config_class)}"
    return [f"{_origin(layers, fields) or otherwise}: {text}"]


def _hint_for(error: Any, name: str, config_class: type[Section]) -> str:
    """Returns a hint for a value of the wrong type, such as a value for a section."""
    fields = [field.name for field in list_fields(config_class)]
    in_section = [field for field in fields if field.startswith(f"{name}.")]
    if in_section:
        main = next((f for f in in_section if f in COMMON_FIELDS), in_section[0])
        return f"; it is a section: set a field of it, such as {main} (--help {name} lists all)"
    if error["type"] in ("list_type", "tuple_type"):
        return "; write a list as [A, B]"
    if error["type"] == "dict_type":
        return "; write a mapping as {NAME: VALUE}, with a space after the colon"
    if error["input"] is None and ":" in name:
        return "; in YAML, a colon must be followed by a space"
    return ""


def _known_field(config_class: type[Section], name: str) -> str:
    """Returns a hint for an unknown field: a similarly named field or, if there is none, the option that lists all."""
    names = [field.name for field in list_fields(config_class)]
    if name in names:  # a YAML key with dots
        *sections, leaf = name.split(".")
        return f"; in a file, write {leaf} indented below {': below '.join(sections)}:"
    parent, _, leaf = name.rpartition(".")
    sections = sorted(
        {n.rsplit(".", 1)[0] for n in names if "." in n} - ({parent} if leaf else set())
    )
    by_leaf: dict[str, list[str]] = {}
    for known in names:
        by_leaf.setdefault(known.rpartition(".")[2], []).append(known)
    matches = by_leaf.get(leaf, [])  # the right name, but in the wrong section
    matches = matches or difflib.get_close_matches(name, names + sections, n=1, cutoff=0.6)
    for close in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.8):
        matches = matches or by_leaf[close]
    return f"; did you mean {' or '.join(matches)}?" if matches else "; --help all lists all fields"


def _fields_in(text: str, config_class: type[TaskConfig]) -> list[str]:
    """Returns the fields that a message mentions in the form `field=value`, or `section.field:`."""
    section = rf"\b(?:{'|'.join(config_class.model_fields)})"
    return re.findall(rf"{section}(?:\.\w+)*(?==)|{section}(?:\.\w+)+(?=:)", text)


def _origin(layers: Sequence[Layer], fields: Sequence[str]) -> str | None:
    """Returns the origin of the last layer that sets any of the fields, or part of one; None if no layer does."""
    for layer in reversed(layers):
        for given in flatten(dict(layer.data)):
            if any(f"{given}.".startswith(f"{x}.") or x.startswith(f"{given}.") for x in fields):
                return layer.where
    return None
