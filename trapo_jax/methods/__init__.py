"""Represents training methods as data: guidance, selection, and the terms of the objective.

`make_method(name)` builds a method from `METHODS`. To define your own, build a `Method` or write a subclass of
`Hyperparameters`, and pass it to `trapo_jax.train.train` or set `method.name` to its import path.
"""

from trapo_jax.methods.describe import describe, fingerprint
from trapo_jax.methods.family import METHODS
from trapo_jax.methods.guidance import ALWAYS, NEVER
from trapo_jax.methods.hyperparameters import Hyperparameters
from trapo_jax.methods.make import (
    find_method,
    hyperparameter_names,
    list_hyperparameters,
    make_method,
    read_hyperparameters,
)
from trapo_jax.methods.method import Method, Normalizer, Schedule, Stage, Term, TokenInputs
from trapo_jax.methods.micro_grouped import PRESETS, Preset
from trapo_jax.methods.selection import Sampled, Selection, Update, expert_row, train_all

__all__ = [
    "ALWAYS",
    "METHODS",
    "NEVER",
    "PRESETS",
    "Hyperparameters",
    "Method",
    "Normalizer",
    "Preset",
    "Sampled",
    "Schedule",
    "Selection",
    "Stage",
    "Term",
    "TokenInputs",
    "Update",
    "describe",
    "expert_row",
    "find_method",
    "fingerprint",
    "hyperparameter_names",
    "list_hyperparameters",
    "make_method",
    "read_hyperparameters",
    "train_all",
]
