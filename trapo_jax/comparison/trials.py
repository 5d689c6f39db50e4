"""Which runs a comparison is made of: methods, settings of the swept fields, seeds.

Everything but the method, the swept fields and the seed is the same for all runs: they are made from one config.
"""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trapo_jax.config import Config, list_fields, load_config, parse_command_line
from trapo_jax.types import UserError

FIRST_TUNING_SEED = 1000  # trials are tuned with seeds of their own
VALIDATION, TEST = "validation", "test"
# Fields that a comparison decides by itself, and the option that does.
DECIDED_HERE = {
    "method.name": "--methods",
    "seed": "--seeds",
    "output_dir": "--out",
    "train.budget_unit": "--match",
    "train.budget": "--budget",
    "train.num_steps": "--match steps --budget",
    "evaluation.splits": "none: tuning looks at the validation split, the final runs at both",
}


# What all runs share: what these fields begin with is the same whatever the method.
SHARED = ("data.", "evaluation.", "rewards.", "model.path")


class Sweep(NamedTuple):
    """Values of one field, for some methods or, with none named, for those that no other sweep names."""

    methods: tuple[str, ...]
    field: str
    values: tuple[str, ...]  # as YAML scalars


class Variant(NamedTuple):
    """A method under a name of its own, with fields that make it another one."""

    name: str
    settings: tuple[tuple[str, str], ...]  # (field, value), `method.name` among them


class Trial(NamedTuple):
    """A method with one setting of the fields that are swept."""

    method: str
    values: tuple[tuple[str, str], ...] = ()  # (field, value)

    @property
    def setting(self) -> str:
        """Such as `learning_rate=2e-4, expert_weight=1`."""
        words = [f"{field.rsplit('.', 1)[-1]}={value}" for field, value in self.values]
        return ", ".join(words) or "as configured"


class Run(NamedTuple):
    """One run of the trainer; its folder is `config.output_dir`."""

    trial: Trial
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def name(self) -> str:
        setting = f" ({self.trial.setting})" if self.trial.values else ""
        return f"{self.trial.method}{setting}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """A comparison as it was asked for.

    Attributes:
      config_file, overrides: of all runs.
      methods: names, of the family or of variants.
      variants: methods with other settings.
      sweeps: what is tuned.
      num_seeds, num_tuning_seeds: runs of each method once tuned; of each trial before.
      match, budget: unit and amount that every run may spend.
      runs: the folder of the runs' folders.
    """

    config_file: Path | None
    overrides: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    variants: tuple[Variant, ...]
    sweeps: tuple[Sweep, ...]
    num_seeds: int
    num_tuning_seeds: int
    match: str
    budget: float
    runs: Path

    def trials(self) -> dict[str, list[Trial]]:
        """Each method's trials, equally many.

        Raises:
          UserError: if one method has more than another, or something is asked for that is decided here.
        """
        for field in [name for name, _ in self.overrides] + [s.field for s in self.sweeps]:
            if field in DECIDED_HERE:
                raise UserError(
                    f"command line: {field}: a comparison decides it ({DECIDED_HERE[field]})"
                )
        for sweep in self.sweeps:
            _refuse_shared("--sweep", sweep.field)
        names = [v.name for v in self.variants]
        if len(set(names)) < len(names):
            raise UserError(f"--variant: a name is given twice ({', '.join(names)})")
        unused = set(names) - set(self.methods)
        if unused:
            raise UserError(f"--variant: {', '.join(sorted(unused))} not among --methods")
        unknown = {m for s in self.sweeps for m in s.methods} - set(self.methods)
        if unknown:
            raise UserError(f"--sweep: {', '.join(sorted(unknown))} not among --methods")
        trials = {method: self._trials_of(method) for method in self.methods}
        if len({len(found) for found in trials.values()}) > 1:
            counts = ", ".join(f"{method} {len(found)}" for method, found in trials.items())
            raise UserError(
                f"--sweep: numbers of trials differ ({counts}); tune every method equally, with "
                "--sweep METHOD:FIELD=VALUE,... for fields that not all methods have"
            )
        return trials

    def _trials_of(self, method: str) -> list[Trial]:
        named = [s for s in self.sweeps if method in s.methods]
        mine = named or [s for s in self.sweeps if not s.methods]
        settings = itertools.product(*([(s.field, value) for value in s.values] for s in mine))
        return [Trial(method, setting) for setting in settings]

    def tuning_runs(self, trials: Sequence[Trial]) -> list[Run]:
        """Runs that look at the validation split alone, seed by seed."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.num_tuning_seeds)
        return [self._run(trial, seed, [VALIDATION]) for seed in seeds for trial in trials]

    def final_runs(self, trials: Sequence[Trial]) -> list[Run]:
        """Runs that are reported, seed by seed; the test split is scored before and after training alone."""
        return [
            self._run(trial, seed, [VALIDATION, TEST])
            for seed in range(self.num_seeds)
            for trial in trials
        ]

    def _run(self, trial: Trial, seed: int, splits: list[str]) -> Run:
        folder = self.runs / trial.method / _file_name(trial.setting) / f"seed_{seed}"
        decided = {
            "seed": str(seed),
            "output_dir": json.dumps(str(folder)),
            "evaluation.splits": json.dumps(splits),
            **_budget(self.match, self.budget),
        }
        own = {v.name: v.settings for v in self.variants}
        method = own.get(trial.method, (("method.name", trial.method),))
        overrides = [*EVENLY, *self.overrides, *method, *trial.values, *decided.items()]
        return Run(trial, seed, load_config(Config, self.config_file, overrides))


# Learning curves have as many points whatever a method's steps cost; a user's override comes later and wins.
EVENLY = (("evaluation.every", "0.2"),)


def _budget(unit: str, amount: float) -> dict[str, str]:
    if unit == "steps":
        # Whatever budget the config file has, it is not this one's.
        return {
            "train.num_steps": str(int(amount)),
            "train.budget_unit": "steps",
            "train.budget": "null",
        }
    # A run ends at its budget, never at a number of steps.
    return {
        "train.num_steps": str(10**9),
        "train.budget_unit": unit,
        "train.budget": repr(float(amount)),
    }


def read_sweep(text: str) -> Sweep:
    """`[METHOD,...:]FIELD=VALUE,...`; a field's last word is enough where only one field ends so.

    >>> read_sweep("trapo,luffy:expert_weight=0.5,2")
    Sweep(methods=('trapo', 'luffy'), field='method.expert_weight', values=('0.5', '2'))

    Raises:
      UserError: for anything else.
    """
    found = re.fullmatch(r"(?:([\w,]+):)?([\w.]+)=([^,=]+(?:,[^,=]+)*)", text)
    if not found:
        raise UserError(f"--sweep {text}: not [METHOD,...:]FIELD=VALUE,VALUE")
    methods = tuple(found[1].split(",")) if found[1] else ()
    values = tuple(found[3].split(","))
    if len(set(values)) < len(values):
        raise UserError(f"--sweep {text}: the same value twice")
    return Sweep(methods, _whole_name(found[2]), values)


def read_variant(text: str) -> Variant:
    """`NAME: method.name=METHOD FIELD=VALUE ...`.

    >>> read_variant("late: method.name=trapo method.alpha=0.5").settings
    (('method.name', 'trapo'), ('method.alpha', '0.5'))

    Raises:
      UserError: for anything else.
    """
    name, _, rest = (part.strip() for part in text.partition(":"))
    try:
        file, given = parse_command_line(shlex.split(rest))
    except ValueError as error:  # of shlex: a quotation without an end
        raise UserError(f"--variant {text}: {error}") from error
    if file:
        raise UserError(f"--variant {text}: all runs have one --config; leave this one out")
    settings = tuple((_whole_name(field), value) for field, value in given)
    fields = [field for field, _ in settings]
    if not re.fullmatch(r"\w+", name) or "method.name" not in fields:
        raise UserError(f"--variant {text}: not NAME: method.name=METHOD FIELD=VALUE ...")
    for field in fields:
        if field in DECIDED_HERE and field != "method.name":
            raise UserError(
                f"--variant {text}: {field}: a comparison decides it ({DECIDED_HERE[field]})"
            )
        _refuse_shared(f"--variant {text}", field)
    return Variant(name, settings)


def _refuse_shared(option: str, field: str) -> None:
    if field.startswith(SHARED):
        raise UserError(
            f"{option}: {field}: all runs share it; give {field}=... without {option.split()[0]}"
        )


def _whole_name(field: str) -> str:
    names = [name for name, *_ in list_fields(Config)]
    ends = [name for name in names if name.rsplit(".", 1)[-1] == field]
    # What is not found is left for the config to complain about, with a near match.
    return field if field in names or len(ends) != 1 else ends[0]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=,+-]", "_", text.replace(", ", ","))
