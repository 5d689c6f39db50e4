"""Defines the grid of a comparison: methods, settings of the swept fields, and seeds.

All runs are derived from one config, so they differ only in the method, the swept fields and the seed.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trapo_jax.config import Config, list_fields, load_config, parse_command_line
from trapo_jax.runs.budget import STEPS
from trapo_jax.types import UserError

FIRST_TUNING_SEED = 1000  # Tuning runs and final runs use different seeds.
UNLIMITED_STEPS = 10**9
MAX_TRIALS = 10_000
VALIDATION, TEST = "validation", "test"
METHOD_NAME = "method.name"
# Fields that the comparison sets, each with the option to use instead or an explanation.
SET_BY_COMPARISON = {
    METHOD_NAME: "use --methods",
    "seed": "use --seeds",
    "output_dir": "use --out",
    "train.budget_unit": "use --match",
    "train.budget": "use --budget",
    "train.num_steps": "use --match steps and --budget",
    "evaluation.splits": "tuning evaluates the validation split, and final runs evaluate both splits",
}
# Prefixes of fields that must be the same for all methods.
SHARED = ("data.", "evaluation.", "rewards.", "model.path")
# By default, all learning curves have the same number of points, regardless of the cost of a step.
DEFAULT_OVERRIDES = (("evaluation.every", "0.2"),)


class Sweep(NamedTuple):
    """Values of a field to try with `methods` or, if `methods` is empty, with all methods that no sweep names."""

    methods: tuple[str, ...]
    field: str
    values: tuple[str, ...]  # YAML values


class Variant(NamedTuple):
    """A method with custom settings and its own name."""

    name: str
    settings: tuple[tuple[str, str], ...]  # (field, value), including `method.name`


class Trial(NamedTuple):
    """A method with one setting of the swept fields."""

    method: str
    values: tuple[tuple[str, str], ...] = ()  # (field, value)

    @property
    def setting(self) -> str:
        """The values of the swept fields, for example `learning_rate=2e-4, expert_weight=1`."""
        assignments = [f"{field.rsplit('.', 1)[-1]}={value}" for field, value in self.values]
        return ", ".join(assignments) or "as configured"


class PlannedRun(NamedTuple):
    """One training run of a comparison."""

    trial: Trial
    seed: int
    config: Config
    record: Path  # the record file

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.run_folder

    @property
    def name(self) -> str:
        """The method, setting and seed, for messages."""
        setting = f" ({self.trial.setting})" if self.trial.values else ""
        return f"{self.trial.method}{setting}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """A comparison requested by the user.

    Attributes:
      config_file: YAML config file for all runs; None for the defaults.
      overrides: (field, value) pairs that apply to all runs.
      methods: names of methods or variants.
      variants: methods with custom settings.
      sweeps: fields to tune.
      num_trials: number of trials per method: one with the configured hyperparameters, and the others with settings
        drawn at random from the method's sweeps; None for all settings.
      num_seeds: number of final runs per method.
      num_tuning_seeds: number of runs of each trial in the best quarter of the trials; the other trials have one run.
      match: unit of the budget.
      budget: budget of each run, in that unit.
      runs: directory that contains the run directories.
      records: directory that contains the records of completed runs.
      margin: largest absolute difference in accuracy between equivalent methods.
    """

    config_file: Path | None
    overrides: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    variants: tuple[Variant, ...]
    sweeps: tuple[Sweep, ...]
    num_trials: int | None
    num_seeds: int
    num_tuning_seeds: int
    match: str
    budget: float
    runs: Path
    records: Path
    margin: float

    def trials(self) -> dict[str, list[Trial]]:
        """Returns the trials of each method; every method has the same number of trials.

        Raises:
          UserError: if the methods would have different numbers of trials, or the options contradict each other.
        """
        self._check_options()
        trials = {method: self._trials_of(method) for method in self.methods}
        if len({len(found) for found in trials.values()}) > 1:
            counts = ", ".join(f"{method} {len(found)}" for method, found in trials.items())
            raise UserError(
                f"--sweep: the numbers of trials differ ({counts}); tune every method equally, using "
                "--sweep METHOD:FIELD=VALUE,... for fields that only some methods have"
            )
        return trials

    def tuning_runs(self, trials: Sequence[Trial], seeds: Sequence[int]) -> list[PlannedRun]:
        """Returns the tuning runs of trials, ordered by seed. They evaluate only the validation split."""
        return [self._plan(trial, seed, [VALIDATION]) for seed in seeds for trial in trials]

    @property
    def tuning_seeds(self) -> range:
        """The seeds of the tuning runs; no final run uses any of them."""
        return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.num_tuning_seeds)

    def final_runs(self, trials: Sequence[Trial]) -> list[PlannedRun]:
        """Returns the runs to report, ordered by seed. They also evaluate the test split, before and after training."""
        return [
            self._plan(trial, seed, [VALIDATION, TEST])
            for seed in range(self.num_seeds)
            for trial in trials
        ]

    def _check_options(self) -> None:
        for field in [name for name, _ in self.overrides] + [s.field for s in self.sweeps]:
            if field in SET_BY_COMPARISON:
                raise UserError(
                    f"command line: {field}: set by the comparison ({SET_BY_COMPARISON[field]})"
                )
        for sweep in self.sweeps:
            _check_not_shared("--sweep", sweep.field)
        if "" in self.methods:
            raise UserError(
                "--methods: an empty name in the list; list methods as in --methods grpo,trapo"
            )
        for variant in self.variants:
            if _is_method(variant.name):
                raise UserError(
                    f"--variant: {variant.name} is the name of a method; choose another name"
                )
        if repeated := {name for name in self.methods if self.methods.count(name) > 1}:
            raise UserError(f"--methods: {', '.join(sorted(repeated))} listed more than once")
        if not self.sweeps and (self.num_trials or self.num_tuning_seeds > 1):
            option = "--trials" if self.num_trials else "--tuning-seeds"
            raise UserError(f"{option}: there is nothing to tune; use --sweep FIELD=VALUE,...")
        names = [v.name for v in self.variants]
        if len(set(names)) < len(names):
            raise UserError(f"--variant: a name is repeated ({', '.join(names)})")
        unused = set(names) - set(self.methods)
        if unused:
            raise UserError(f"--variant: {', '.join(sorted(unused))} not listed in --methods")
        unknown = {m for s in self.sweeps for m in s.methods} - set(self.methods)
        if unknown:
            raise UserError(f"--sweep: {', '.join(sorted(unknown))} not listed in --methods")

    def _trials_of(self, method: str) -> list[Trial]:
        named = [s for s in self.sweeps if method in s.methods]
        sweeps = named or [s for s in self.sweeps if not s.methods]
        choices = [[(sweep.field, value) for value in sweep.values] for sweep in sweeps]
        num_settings = math.prod(map(len, choices))
        if self.num_trials is None or self.num_trials >= num_settings:
            if num_settings > MAX_TRIALS:
                raise UserError(
                    f"--sweep: {method} has {num_settings:,} settings; draw some of them with --trials N"
                )
            return [Trial(method, setting) for setting in itertools.product(*choices)]
        if num_settings > sys.maxsize:
            raise UserError(
                f"--sweep: {method} has {num_settings:,} settings, too many to draw from"
            )
        # For methods with the same number of settings, the same positions are drawn.
        drawn = random.Random(0).sample(range(num_settings), self.num_trials - 1)
        return [Trial(method), *(Trial(method, _setting_at(i, choices)) for i in drawn)]

    def _plan(self, trial: Trial, seed: int, splits: list[str]) -> PlannedRun:
        name = Path(trial.method) / _file_name(trial.setting) / f"seed_{seed}"
        folder = self.runs / name
        set_here = {
            "seed": str(seed),
            "output_dir": json.dumps(str(folder)),
            "evaluation.splits": json.dumps(splits),
            **_budget_fields(self.match, self.budget),
        }
        variants = {v.name: v.settings for v in self.variants}
        method = variants.get(trial.method, ((METHOD_NAME, trial.method),))
        overrides = [
            *DEFAULT_OVERRIDES,
            *self.overrides,
            *method,
            *trial.values,
            *set_here.items(),
        ]
        config = load_config(Config, self.config_file, overrides)
        return PlannedRun(trial, seed, config, self.records / f"{name}.json")


def _budget_fields(unit: str, amount: float) -> dict[str, str]:
    if unit == STEPS:
        return {
            "train.num_steps": str(int(amount)),
            "train.budget_unit": STEPS,
            "train.budget": "null",  # overrides the budget in the config file
        }
    return {
        "train.num_steps": str(UNLIMITED_STEPS),
        "train.budget_unit": unit,
        "train.budget": repr(float(amount)),
    }


def parse_sweep(text: str) -> Sweep:
    """Parses `[METHOD,...:]FIELD=VALUE,...`. FIELD may be just the last part of a field's name if it is unique.

    Commas inside brackets belong to a value.

    >>> parse_sweep("trapo,luffy:expert_weight=0.5,2")
    Sweep(methods=('trapo', 'luffy'), field='method.expert_weight', values=('0.5', '2'))
    >>> parse_sweep("micro_groups=[[8,0,-1]],[[7,0,-1],[1,1,0.5]]").values
    ('[[8,0,-1]]', '[[7,0,-1],[1,1,0.5]]')

    Raises:
      UserError: if the text does not have this form, or a value is repeated.
    """
    found = re.fullmatch(r"(?:([\w,]+):)?([\w.]+)=([^=]+)", text)
    values = _split_values(found[3]) if found else ()
    if not found or not all(values):
        raise UserError(f"--sweep {text}: expected [METHOD,...:]FIELD=VALUE,VALUE")
    methods = tuple(found[1].split(",")) if found[1] else ()
    if len(set(values)) < len(values):
        raise UserError(f"--sweep {text}: a value is repeated")
    return Sweep(methods, _full_field_name(found[2]), values)


def _split_values(text: str) -> tuple[str, ...]:
    """Splits a string at the commas that are not inside brackets."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return tuple(values)


def parse_variant(text: str) -> Variant:
    """Parses `NAME: method.name=METHOD FIELD=VALUE ...`.

    >>> parse_variant("late: method.name=trapo method.alpha=0.5").settings
    (('method.name', 'trapo'), ('method.alpha', '0.5'))

    Raises:
      UserError: if the text does not have this form, or sets a field that variants must not set.
    """
    name, _, rest = (part.strip() for part in text.partition(":"))
    try:
        file, overrides = parse_command_line(shlex.split(rest))
    except ValueError as error:  # raised by shlex for a missing closing quotation mark
        raise UserError(f"--variant {text}: {error}") from error
    if file:
        raise UserError(
            f"--variant {text}: --config applies to all runs; pass it outside --variant"
        )
    settings = tuple((_full_field_name(field), value) for field, value in overrides)
    fields = [field for field, _ in settings]
    if not re.fullmatch(r"\w+", name) or METHOD_NAME not in fields:
        raise UserError(f"--variant {text}: expected NAME: method.name=METHOD FIELD=VALUE ...")
    for field in fields:
        if field in SET_BY_COMPARISON and field != METHOD_NAME:
            raise UserError(
                f"--variant {text}: {field}: set by the comparison ({SET_BY_COMPARISON[field]})"
            )
        _check_not_shared(f"--variant {text}", field)
    return Variant(name, settings)


def _check_not_shared(option: str, field: str) -> None:
    if field.startswith(SHARED):
        raise UserError(
            f"{option}: {field}: must be the same for all runs; pass {field}=... without {option.split()[0]}"
        )


def _full_field_name(field: str) -> str:
    names = [name for name, *_ in list_fields(Config)]
    matches = [name for name in names if name.rsplit(".", 1)[-1] == field]
    # Unknown names are kept so that an error with a suggestion is raised when the config is loaded.
    return field if field in names or len(matches) != 1 else matches[0]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=,+-]", "_", text.replace(", ", ","))


def _setting_at(
    index: int, choices: Sequence[Sequence[tuple[str, str]]]
) -> tuple[tuple[str, str], ...]:
    """Returns the setting at a position of `itertools.product(*choices)`."""
    setting = []
    for values in reversed(choices):
        index, i = divmod(index, len(values))
        setting.append(values[i])
    return tuple(reversed(setting))


def _is_method(name: str) -> bool:
    """Returns whether `name` is a valid value of `method.name` in a config."""
    try:
        load_config(Config, None, [(METHOD_NAME, name)])
    except UserError:
        return False
    return True
