"""Finds and hashes the user code that a config refers to by import path."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trapo_jax.config.evaluation import EvaluateConfig
from trapo_jax.config.training import Config
from trapo_jax.inputs.import_path import import_object

PACKAGE = "trapo_jax"


class SourceFile(NamedTuple):
    """A source file of user code.

    Attributes:
      module: the name of the module.
      path: the path of the file.
      sha256: the SHA-256 hash of the file.
    """

    module: str
    path: Path
    sha256: str


def user_code(config: Config | EvaluateConfig) -> list[SourceFile]:
    """Returns the source files of the reward functions and the method that a config refers to by import path.

    If the module in an import path imports the function or class from another module, the file of that module is
    included as well. Files of other imported modules are not included.

    Raises:
      UserError: if an import path cannot be imported.
    """
    names: dict[str, None] = {}
    for field, path in _import_paths(config):
        found = import_object(path, field)
        names[path.partition(":")[0]] = None
        # The module may have imported the function or class from another module.
        if hasattr(found, "__qualname__"):
            names[found.__module__] = None
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return [
        SourceFile(name, Path(file), hashlib.sha256(Path(file).read_bytes()).hexdigest())
        for name, file in files.items()
        if file and Path(file).is_file() and name.partition(".")[0] != PACKAGE
    ]


def _import_paths(config: Config | EvaluateConfig) -> Iterator[tuple[str, str]]:
    """Yields the fields that contain import paths, each with its import path."""
    rewards = config.rewards
    yield from (("rewards.functions", name) for name in rewards.functions if ":" in name)
    by_source = (rewards.by_source or {}).items()
    yield from ((f"rewards.by_source.{x}", name) for x, name in by_source if ":" in name)
    if isinstance(config, Config) and ":" in config.method.name:
        yield "method.name", config.method.name
