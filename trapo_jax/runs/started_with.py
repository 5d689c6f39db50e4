"""Collects the code versions and settings of a process, so that the processes of a job can check that they match."""

import hashlib
from pathlib import Path
from typing import Any

import jax

from trapo_jax import __version__
from trapo_jax.config import Config, flatten
from trapo_jax.methods import Method, fingerprint


def started_with(config: Config, method: Method) -> dict[str, Any]:
    """Returns the code versions, config fields and method fields as JSON-serializable values, keyed by name."""
    return {
        "trapo_jax": code_version(),
        "jax": jax.__version__,
        **flatten(config.model_dump(mode="json")),
        **{f"the method's {name}": value for name, value in fingerprint(method).items()},
    }


def code_version() -> str:
    """Returns the version of trapo_jax followed by a hash of its source files, which distinguishes checkouts."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode())
        digest.update(file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
