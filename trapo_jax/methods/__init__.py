"""The family of methods as data: guidance, selection, and the terms of the objective.

`make_method(name)` gives one of `METHODS`; a method of your own is a `Method` that you build, and whatever takes one
(`train_one_step`, `make_train_step`) takes it.
"""

from trapo_jax.methods.common import PRESETS, Preset
from trapo_jax.methods.describe import describe, fingerprint
from trapo_jax.methods.family import METHODS
from trapo_jax.methods.guidance import ALWAYS, NEVER
from trapo_jax.methods.make import constants_of, make_method
from trapo_jax.methods.method import Method, Normalizer, Schedule, Term, TokenInputs
from trapo_jax.methods.selection import Sampled, Selection, Update, train_all

__all__ = [
    "ALWAYS",
    "METHODS",
    "NEVER",
    "PRESETS",
    "Method",
    "Normalizer",
    "Preset",
    "Sampled",
    "Schedule",
    "Selection",
    "Term",
    "TokenInputs",
    "Update",
    "constants_of",
    "describe",
    "fingerprint",
    "make_method",
    "train_all",
]
