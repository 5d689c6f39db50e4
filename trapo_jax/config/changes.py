"""Flattens configurations and lists the fields that may change when a run is resumed."""

from collections.abc import Collection
from typing import Any

# Fields that may change when a run is resumed. They affect the results only through rounding and, if
# sampling.max_staleness > 0, through the timing of the rollouts. A name that ends with a dot denotes a whole section.
CHANGEABLE_FIELDS = (
    "output_dir",
    "log_samples",
    "trackers",
    "model.remat",
    "model.attention",
    "sampling.num_slots",
    "sampling.segment_len",
    "sampling.num_contexts",
    "sampling.prefill_tokens",
    "rewards.workers",
    "rewards.max_error_rate",
    "train.row_length",
    "train.per_device_rows",
    "train.logprob_chunk_size",
    "train.max_skipped_steps",
    "evaluation.every",
    "checkpoint.",
    "limits.",
    "mesh.",
)


def is_changeable(field: str) -> bool:
    """Returns whether a field may change when a run is resumed."""
    return any(field.startswith(x) if x.endswith(".") else field == x for x in CHANGEABLE_FIELDS)


def flatten(
    data: dict[str, Any], prefix: str = "", *, leaves: Collection[str] = ()
) -> dict[str, Any]:
    """Flattens nested dicts into one dict with dotted names as keys, as on the command line.

    Args:
      data: the nested dicts.
      prefix: what all keys of the result start with.
      leaves: dotted names of values that are not flattened even if they are dicts.
    """
    flat = {}
    for name, value in data.items():
        field = f"{prefix}{name}"
        if isinstance(value, dict) and field not in leaves:
            flat |= flatten(value, f"{field}.", leaves=leaves)
        else:
            flat[field] = value
    return flat
