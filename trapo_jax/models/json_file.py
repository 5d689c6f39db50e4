"""JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from trapo_jax.paths import USE_LFS, is_lfs_pointer
from trapo_jax.types import UserError


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if the file cannot be read or does not contain a JSON object. The one-line error names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise UserError(f"{path}: {USE_LFS}") from error
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data
