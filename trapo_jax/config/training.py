"""Defines the configuration of a training run."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import pydantic
import yaml
from pydantic import Field

from trapo_jax.config.changes import flatten, is_changeable
from trapo_jax.config.schema import (
    DATA_FILES,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GradingConfig,
    LimitsConfig,
    LoraConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    NotNegative,
    PretrainedConfig,
    RewardsConfig,
    SamplingConfig,
    Section,
    StringList,
    TrainConfig,
)
from trapo_jax.config.tasks import BUILT_IN_MODEL, FILES, OPTIONS_OF_SOURCES, TASKS
from trapo_jax.types import UserError


class TaskConfig(Section):
    """A configuration with the sections `data`, `model` and `sampling`. `data.source` selects defaults; see `TASKS`."""

    if TYPE_CHECKING:
        output_dir: str | None
        data: DataConfig
        # Subclasses declare these as their own kinds of `PretrainedConfig` and `EngineConfig`.
        model: Any
        sampling: Any

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_task_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        given = _as_mapping(data.get("data", {}))
        if given is None:
            return data  # Field validation reports the mistake.
        source = given.get("source", cls._default_source(given, _as_mapping(data.get("model", {}))))
        data["data"] = {**given, "source": source}
        for section, fields in TASKS.get(source, {}).items() if isinstance(source, str) else ():
            of_section = _as_mapping(data.get(section, {}))
            if section in cls.model_fields and of_section is not None:
                known = cls.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
                defaults = {name: value for name, value in fields.items() if name in known}
                data[section] = {**defaults, **of_section}
        return data

    @classmethod
    def _default_source(cls, data: Mapping[str, Any], model: Mapping[str, Any] | None) -> str:
        """Returns the default of `data.source`. The built-in task is the default only for the built-in model."""
        is_built_in = (model or {}).get("path") in (None, "", BUILT_IN_MODEL)
        return FILES if data.get("train_files") or not is_built_in else "card_shuffles"

    @property
    def run_folder(self) -> Path:
        """`output_dir` with ~ expanded, or its default: a name, and a hash of the changed fields if there are any."""
        if self.output_dir is not None:
            return Path(os.path.expanduser(self.output_dir))
        settings = flatten(self.model_dump(mode="json"))
        defaults = default_settings(type(self), settings)
        changed = {
            field: value
            for field, value in settings.items()
            if defaults.get(field) != value and not is_changeable(field)
        }
        text = json.dumps(changed, sort_keys=True)
        digest = f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if changed else ""
        return Path(self._default_folder() + digest)

    def _default_folder(self) -> str:
        """Returns the default of `output_dir` for a config without changed fields."""
        raise NotImplementedError

    @property
    def longest_rollout_len(self) -> int:
        """Length of the longest possible rollout in tokens, including the prompt.

        Raises:
          UserError: if a length is null because it has not been derived from the data yet; see `with_lengths`.
        """
        return self.data.prompt_len + self.sampling.completion_len

    def with_lengths(self, *, prompt: int, completion: int) -> Self:
        """Returns a copy of the config in which null lengths have these values. Its `output_dir` is the current one."""
        data = self.model_dump(mode="json")
        data["output_dir"] = str(self.run_folder)
        if data["data"]["max_prompt_length"] is None:
            data["data"]["max_prompt_length"] = prompt
        if data["sampling"]["max_completion_length"] is None:
            data["sampling"]["max_completion_length"] = completion
        try:
            return type(self).model_validate(data)
        except pydantic.ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def _as_mapping(section: Any) -> dict[str, Any] | None:
    """Returns the fields that were set explicitly in a section; None if it is not a section."""
    if isinstance(section, Section):
        return section.model_dump(mode="json", exclude_unset=True)
    return section if isinstance(section, dict) else None


class Config(TaskConfig):
    """All settings of a training run."""

    output_dir: Annotated[str, Field(min_length=1)] | None = None
    """Run directory. If it contains a run, that run is resumed. null for runs/TASK_METHOD, followed by a hash of the fields that differ from their defaults, if any."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed for the data order and for sampling."""
    log_samples: NotNegative = 4
    """Number of problems per step whose rollouts are written to samples.jsonl."""
    trackers: StringList = ("tensorboard",)
    """Experiment trackers that receive the metrics: tensorboard, wandb (requires the extra `wandb`), trackio (requires the extra `trackio`), or the import path `package.module:name` of your own."""
    model: ModelConfig = ModelConfig()
    """The model to train, its precision, and the memory that its backward pass may use."""
    lora: LoraConfig = LoraConfig()
    """Training of low-rank adapters instead of all weights."""
    data: DataConfig = DataConfig()
    """The problems: files or generated tasks, columns, prompts, and the sizes of the splits."""
    method: MethodConfig = MethodConfig()
    """The training method and its hyperparameters; --print-method describes the chosen one."""
    sampling: SamplingConfig = SamplingConfig()
    """How rollouts are sampled: engine, temperature, lengths, and concurrency."""
    rewards: RewardsConfig = RewardsConfig()
    """The reward functions and the worker processes that execute them."""
    train: TrainConfig = TrainConfig()
    """Duration, batch size, optimizer, learning-rate schedule, and packing."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the model is evaluated during training, on what, and with how many samples."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved and which are kept."""
    limits: LimitsConfig = LimitsConfig()
    """When a run that cannot continue is stopped."""
    mesh: MeshConfig = MeshConfig()
    """How parameters and batches are sharded over devices."""

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Self:
        train, data = self.train, self.data
        if train.budget is None and train.budget_unit != "steps":
            raise ValueError(
                f"train.budget=null: train.budget_unit={train.budget_unit} needs an amount; set a number"
            )
        check_spelling(self.model.path)
        check_options_of_source(data)
        check_files(data, "train_files")
        check_model(self.model)
        if self.rewards.by_source or self.method.make().needs_rewards:
            check_functions(self.rewards.functions, data)
        if data.source != FILES and train.problems_per_step > (data.num_train or 0):
            raise ValueError(
                f"train.problems_per_step={train.problems_per_step}: larger than "
                f"data.num_train={data.num_train}, so a batch would repeat problems"
            )
        check_weights(self.rewards, self.rewards.functions)
        if self.mesh.fsdp == 0:
            raise ValueError(
                "mesh.fsdp=0: set a number of devices, or -1 for all devices that remain after mesh.tp"
            )
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: with evaluation.every=0, no best "
                "checkpoint is ever found; set evaluation.every to an interval"
            )
        if self.checkpoint.load_best_model_at_end and not self.checkpoint.keep_best:
            raise ValueError(
                "checkpoint.load_best_model_at_end=true: with checkpoint.keep_best=0, no best checkpoint is kept; set "
                "checkpoint.keep_best to 1"
            )
        if None not in (data.max_prompt_length, self.sampling.max_completion_length) and (
            self.row_len < self.longest_rollout_len
        ):
            raise ValueError(
                f"train.row_length={train.row_length}: less than data.max_prompt_length + "
                f"sampling.max_completion_length = {self.longest_rollout_len}, so a rollout might not fit"
            )
        return self

    def _default_folder(self) -> str:
        task = Path(self.data.train_files[0]).stem if self.data.train_files else self.data.source
        name = re.sub(r"[^\w-]+", "-", f"{task}_{self.method.name}").strip("-")
        return f"runs/{name}"

    @property
    def row_len(self) -> int:
        """Length of a training row in tokens."""
        return self.train.row_length or self.longest_rollout_len

    def to_yaml(self) -> str:
        """Returns all fields as YAML that `load_config` can read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def default_settings(config_class: type[TaskConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all values of a config that sets only `data.source` and, if it trains, `method.name`.

    Args:
      config_class: the class of the config.
      settings: the values of these two fields, and possibly of others, keyed by dotted name. The result has such keys.
    """
    source = settings["data.source"]
    given = {name: dict(fields) for name, fields in TASKS[source].items()}
    given.setdefault("data", {})["source"] = source
    given["method"] = {"name": settings.get("method.name")}
    defaults = {}
    for name, field in config_class.model_fields.items():
        value = field.default
        if isinstance(value, Section):
            known = type(value).model_fields.keys() & given.get(name, {}).keys()
            fields = {field: given[name][field] for field in known}
            value = type(value).model_validate(fields).model_dump(mode="json")
        defaults[name] = value
    return flatten(defaults)


def check_files(data: DataConfig, *needed: str) -> None:
    """Checks that data files are set if and only if they are the source of the problems.

    Args:
      data: the data section.
      needed: fields at least one of which must be set; the error names the first.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    if data.source == FILES and not any(getattr(data, field) for field in needed):
        raise ValueError(
            f"data.{needed[0]}: not set; specify files or Hub datasets, or set data.source to card_shuffles or "
            "reasoning_gym for generated problems"
        )
    unread = [field for field in DATA_FILES if data.source != FILES and getattr(data, field)]
    if unread:
        raise ValueError(
            f"data.source={data.source}: data.{unread[0]} is not read; set data.source=files"
        )


def check_model(model: PretrainedConfig) -> None:
    """Checks that a model is specified.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    if not model.path:
        raise ValueError("model.path: not set; specify a Hugging Face model folder or a Hub id")


def check_spelling(path: str) -> None:
    """Checks that `model.path` is not a misspelled name of the built-in model.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    is_similar = difflib.get_close_matches(path, [BUILT_IN_MODEL], cutoff=0.8)
    if path != BUILT_IN_MODEL and is_similar and not Path(path).expanduser().exists():
        raise ValueError(f"model.path={path}: no such model; did you mean {BUILT_IN_MODEL}?")


def check_options_of_source(data: DataConfig) -> None:
    """Checks that no option of another source of problems is set.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    for field, source in OPTIONS_OF_SOURCES.items():
        value = getattr(data, field)
        if data.source != source and value != DataConfig.model_fields[field].default:
            raise ValueError(
                f"data.{field}={json.dumps(value)}: has an effect only with data.source={source}, but data.source is "
                f"{data.source}"
            )
    if data.source == FILES and data.num_train is not None:
        raise ValueError(
            f"data.num_train={data.num_train}: has no effect with data.source=files; set data.limit to read fewer rows"
        )


def check_functions(functions: Sequence[str], data: DataConfig) -> None:
    """Checks that there is at least one reward function, and that `reasoning_gym` gets what it needs.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    if not functions:
        raise ValueError(
            f"rewards.functions: not set, and data.source={data.source} has no default; use math for mathematical answers, "
            "multiple_choice for letters, or the import path of your own function"
        )
    has_metadata = data.source == "reasoning_gym" or "metadata" in data.columns.extra
    if "reasoning_gym" in functions and not has_metadata:
        raise ValueError(
            "rewards.functions: reasoning_gym requires data.source=reasoning_gym, or files with the tasks' metadata "
            "(data.columns.extra=metadata)"
        )


def check_weights(grading: GradingConfig, functions: Sequence[str]) -> None:
    """Checks that there is one weight for each reward function.

    Raises:
      ValueError: if the check fails. The message names the field.
    """
    if grading.weights is not None and len(grading.weights) != len(functions):
        raise ValueError(
            f"rewards.weights={list(grading.weights)}: rewards.functions has {len(functions)} entries; set one weight "
            "for each"
        )
