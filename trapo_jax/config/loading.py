"""Reads configurations from YAML files and `a.b=c` overrides.

The file and the overrides are merged as plain data, which is validated once and strictly. Every mistake is reported
in one line that names the field, where it was set, its value, and how to fix it.
"""

import difflib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml

from trapo_jax.config.changes import flatten
from trapo_jax.config.help import list_fields
from trapo_jax.config.schema import DATA_FILES, MethodConfig, Section
from trapo_jax.config.training import Config, TaskConfig
from trapo_jax.files import read_text, reason_of, shown
from trapo_jax.import_path import search_beside
from trapo_jax.methods import constant_names
from trapo_jax.paths import did_you_mean, find_config, look_up
from trapo_jax.types import UserError

C = TypeVar("C", bound=TaskConfig)

# A resolved config has about 4,000 characters.
MAX_CONFIG_BYTES = MAX_CONFIG_SIZE = 2**18
MAX_DEPTH = 50
MAX_NUMBER_CHARS = 400
MAX_MISTAKES, MAX_NAME_CHARS = 20, 200  # limits on what error messages show
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
COMMAND_LINE = "command line"


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
        # Strict JSON mode rejects "3" for 3 and true for 1, but accepts lists and mappings as YAML produces them.
        config = config_class.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        given = [*layers, Layer(COMMAND_LINE, dict(overrides))]
        where = str(file or COMMAND_LINE)  # the origin of fields that are not set anywhere
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
    """Loads the configuration of a training run; `trapo_jax.load_config` is this function.

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
    _drop_constants_of_another_method(data, dict(values).get("method.name"))
    for name, value in values:
        _set_field(data, name, value, layers)
    return data


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping from a file.

    Raises:
      UserError: if the file cannot be read, or for a syntax error, naming the file and the line.
    """
    try:
        text = read_text(file, max_bytes=MAX_CONFIG_BYTES)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{error}{did_you_mean(str(file))}") from error
        raise
    try:
        data = _parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({error.problem})") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected fields such as 'seed: 0', found {_shorten(data)}")
    _check_plain(data, str(file))
    return data


def _check_plain(value: Any, where: str) -> None:
    """Checks that a value can be written as JSON in UTF-8. Values such as dates become strings."""
    try:
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        fields = flatten(value) if isinstance(value, dict) else {}
        name = next((shown(x) for x, inner in fields.items() if not _is_unicode(x, inner)), "")
        raise UserError(f"{where}: {name + ': ' if name else ''}not Unicode text") from error
    except (TypeError, ValueError) as error:  # for example, a date as a key
        raise UserError(f"{where}: not plain fields and values ({error})") from error


def _is_unicode(name: str, value: Any) -> bool:
    try:
        json.dumps([name, value], default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
            hint = f"; did you mean --config {argument}?" if argument.endswith(".yaml") else ""
            raise UserError(f"command line: {argument!r} is not FIELD=VALUE{hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"command line: --{name} has no value")
            value = rest.pop(0)
        if not name:
            raise UserError(f"command line: {argument!r} has no field name")
        if is_option and name == "config":
            if file is not None:
                raise UserError(f"command line: two --config files, {file} and {value}; pass one")
            file = find_config(value)
        else:
            overrides.append((name, value))
    return file, overrides


class _Loader(yaml.SafeLoader):
    """Reads floats as in YAML 1.2 (`1e-6` is a number), rejects duplicate keys, and limits the expanded size.

    An alias counts as much as the node that it repeats, because a few nested aliases could otherwise fill any memory.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._depth = 0
        self._size = 0  # size of the data read so far, in characters and nodes
        self._sizes: dict[int, int] = {}  # sizes of nodes, keyed by `id(node)`

    def compose_node(self, parent, index):
        event = self.peek_event()
        before = self._size
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error("nested too deeply", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error("an alias inside the node that it repeats", event)
            self._size += self._sizes[id(node)]
        else:
            self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self._sizes[id(node)] = self._size - before
        if self._size > MAX_CONFIG_SIZE:
            raise _error(f"expands to more than {MAX_CONFIG_SIZE:,} characters", event)
        return node

    def construct_scalar(self, node):
        if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARS:
            # Reading a long number in base 60 takes minutes.
            raise _error(f"a number with {len(node.value)} characters", node)
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error(f"{_shorten(key)} cannot be a field name", key_node)
            if key in seen:
                raise _error(f"duplicate key {shown(key)}", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _error(problem: str, where: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"),
    "-+.0123456789",
)


def _parse_yaml(text: str) -> Any:
    """Parses YAML text; raises `yaml.MarkedYAMLError` for any invalid text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError:
        raise
    except yaml.YAMLError as error:  # for example, a control character
        raise yaml.MarkedYAMLError(problem=str(error).splitlines()[0]) from error
    # numbers with 5,000 digits, February 31, tags that do not fit their values
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.MarkedYAMLError(problem=reason_of(error)) from error


def _parse_scalar(name: str, text: str) -> Any:
    if len(name) > MAX_NAME_CHARS:
        raise UserError(f"{COMMAND_LINE}: {shown(name)}: a name with {len(name)} characters")
    _check_plain(name, f"{COMMAND_LINE}: {shown(name)}")
    try:
        value = _parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{COMMAND_LINE}: {name}={text!r:.200}: not a YAML value") from error
    _check_plain(value, f"{COMMAND_LINE}: {name}")
    is_plain = (value is None or isinstance(value, str)) and not text.lstrip().startswith(
        ("'", '"')
    )
    return text.strip() if is_plain and "#" in text else value  # Overrides have no comments.


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of `first` updated with `second`, section by section."""
    merged = {}
    for name in {**first, **second}:
        old, new = first.get(name), second.get(name, first.get(name))
        if isinstance(new, Mapping):
            new = _merge(old if isinstance(old, Mapping) else {}, new)
        merged[name] = new
    return merged


def _drop_constants_of_another_method(data: dict[str, Any], name: Any) -> None:
    """Drops method constants from the file that the method set on the command line does not have."""
    section = data.get("method")
    if not isinstance(section, dict) or not isinstance(name, str):
        return
    of_file = section.get("name", MethodConfig.model_fields["name"].default)
    dropped = {*constant_names(of_file)} - {*constant_names(name)}
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
                f"{_origin(layers, [field]) or COMMAND_LINE}: {field}={_shorten(inner)}: not a section, but the command line "
                f"sets {name}"
            )
        data = inner
    data[leaf] = value


def _explain(
    error: Any, config_class: type[TaskConfig], layers: Sequence[Layer], *, otherwise: str
) -> list[str]:
    """Returns lines, usually one, with the origin, the field, its value, the problem, and how to fix it."""
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
        text = f"{name}={_shorten(error['input'])}: {message}"
    return [f"{_origin(layers, fields) or otherwise}: {text}"]


def _known_field(config_class: type[Section], name: str) -> str:
    """Returns a hint for an unknown field: a similar field, or otherwise the option that lists all fields."""
    names = [field.name for field in list_fields(config_class)]
    parent, _, leaf = name.rpartition(".")
    sections = sorted(
        {n.rsplit(".", 1)[0] for n in names if "." in n} - ({parent} if leaf else set())
    )
    matches = difflib.get_close_matches(name, names + sections, n=1, cutoff=0.6)
    if not matches:  # The name may be right, but in the wrong section.
        leaves = {n.rsplit(".", 1)[-1]: n for n in names}
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
        matches = [leaves[m] for m in close]
    return f"; did you mean {matches[0]}?" if matches else "; --help lists all fields"


def _fields_in(text: str, config_class: type[TaskConfig]) -> list[str]:
    """Returns the fields whose values appear in a message."""
    return re.findall(rf"\b(?:{'|'.join(config_class.model_fields)})(?:\.\w+)*(?==)", text)


def _origin(layers: Sequence[Layer], fields: Sequence[str]) -> str | None:
    """Returns the origin of the last layer that sets any of the fields, or part of one; None if no layer does."""
    for layer in reversed(layers):
        for given in flatten(dict(layer.data)):
            if any(f"{given}.".startswith(f"{x}.") or x.startswith(f"{given}.") for x in fields):
                return layer.where
    return None


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
