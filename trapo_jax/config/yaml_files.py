"""Parses YAML strictly, with limits on its size and nesting depth, because configuration files may be untrusted."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from trapo_jax.config.changes import flatten
from trapo_jax.inputs.files import read_text, reason_of, shown
from trapo_jax.inputs.paths import did_you_mean, similar_config, working_directory
from trapo_jax.types import UserError

# A resolved config has about 4,000 characters.
MAX_CONFIG_BYTES = MAX_CONFIG_SIZE = 2**18


MAX_DEPTH = 50


MAX_NUMBER_CHARS = 400


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML mapping from a file.

    Raises:
      UserError: if the file cannot be read or is not valid YAML. The message names the file and, if known, the line.
    """
    try:
        text = read_text(file, max_bytes=MAX_CONFIG_BYTES)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            where = working_directory(file)
            hint = did_you_mean(str(file)) or similar_config(file)
            raise UserError(f"{file}: no such file{where}{hint}") from error
        raise
    try:
        data = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid YAML ({error.problem})") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected fields such as 'seed: 0', found {shorten(data)}")
    check_plain(data, str(file))
    return data


def check_plain(value: Any, where: str) -> None:
    """Checks that a value can be written as JSON in UTF-8. Values such as dates are written as strings.

    Raises:
      UserError: if the value cannot be written. The message starts with `where`.
    """
    try:
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        fields = flatten(value) if isinstance(value, dict) else {}
        name = next((shown(x) for x, inner in fields.items() if not _is_unicode(x, inner)), "")
        raise UserError(f"{where}: {name + ': ' if name else ''}not Unicode text") from error
    except (TypeError, ValueError) as error:  # for example, a date as a key
        raise UserError(
            f"{where}: contains something that cannot be written as JSON ({error})"
        ) from error


def _is_unicode(name: str, value: Any) -> bool:
    try:
        json.dumps([name, value], default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Loader(yaml.SafeLoader):
    """Reads floats as in YAML 1.2 (`1e-6` is a number), rejects duplicate keys, and limits the expanded size.

    An alias counts as much as the node that it refers to, because a few nested aliases could otherwise exhaust memory.
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
                raise _error("an alias inside the node that it refers to", event)
            self._size += self._sizes[id(node)]
        else:
            self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self._sizes[id(node)] = self._size - before
        if self._size > MAX_CONFIG_SIZE:
            raise _error(f"expands to more than {MAX_CONFIG_SIZE:,} characters", event)
        return node

    def construct_scalar(self, node):
        if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARS:
            # Parsing a long number in base 60 takes minutes.
            raise _error(f"a number with {len(node.value)} characters", node)
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error(f"{shorten(key)} cannot be a field name", key_node)
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


def parse_yaml(text: str) -> Any:
    """Parses YAML text; raises `yaml.MarkedYAMLError` for any invalid text."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError:
        raise
    except yaml.YAMLError as error:  # for example, a control character
        raise yaml.MarkedYAMLError(problem=str(error).splitlines()[0]) from error
    # for example, numbers with 5,000 digits, February 31, and tags that do not match their values
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.MarkedYAMLError(problem=reason_of(error)) from error


def shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
