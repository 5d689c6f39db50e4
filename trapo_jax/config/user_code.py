"""The user's code that a config names by import path, and its fingerprints."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trapo_jax.config.evaluation import EvaluateConfig
from trapo_jax.config.training import Config
from trapo_jax.import_path import import_object

PACKAGE = "trapo_jax"


class SourceFile(NamedTuple):
    """A module of the user's.

    Attributes:
      module: its name.
      path: its file.
      sha256: a hash of the file.
    """

    module: str
    path: Path
    sha256: str


def user_code(config: Config | EvaluateConfig) -> list[SourceFile]:
    """Returns the modules of the reward functions and of the method that a config names by import path.

    Modules that they import are not included, except the one in which the function or class itself is defined.

    Raises:
      UserError: if one of them cannot be imported.
    """
    names: dict[str, None] = {}
    for field, path in _import_paths(config):
        found = import_object(path, field)
        names[path.partition(":")[0]] = None
        # A function or class may be imported from another module.
        if hasattr(found, "__qualname__"):
            names[found.__module__] = None
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return [
        SourceFile(name, Path(file), hashlib.sha256(Path(file).read_bytes()).hexdigest())
        for name, file in files.items()
        if file and Path(file).is_file() and name.partition(".")[0] != PACKAGE
    ]


def _import_paths(config: Config | EvaluateConfig) -> Iterator[tuple[str, str]]:
    """Yields fields and import paths."""
    rewards = config.rewards
    yield from (("rewards.functions", name) for name in rewards.functions if ":" in name)
    by_source = (rewards.by_source or {}).items()
    yield from ((f"rewards.by_source.{x}", name) for x, name in by_source if ":" in name)
    if isinstance(config, Config) and ":" in config.method.name:
        yield "method.name", config.method.name
