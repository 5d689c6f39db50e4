"""Defines the configuration of `trapo_jax.evaluate`, built from the same sections as a training config."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from trapo_jax.config.changes import flatten
from trapo_jax.config.help import list_fields
from trapo_jax.config.loading import Layer, load_layers, merge_layers, read_yaml
from trapo_jax.config.schema import (
    CONFIG_FILE,
    DataConfig,
    EngineConfig,
    GradingConfig,
    Length,
    NotNegative,
    PretrainedConfig,
    Rows,
    ScoringConfig,
    StringList,
)
from trapo_jax.config.tasks import BUILT_IN_MODEL, FILES, OPTIONS_OF_SOURCES
from trapo_jax.config.training import (
    Config,
    TaskConfig,
    check_files,
    check_functions,
    check_model,
    check_options_of_source,
    check_spelling,
    check_weights,
)
from trapo_jax.inputs.paths import did_you_mean, look_up, working_directory
from trapo_jax.types import UserError

# Fields that determine which problems of the training files a run holds out.
HELD_OUT_BY = ("limit", "num_test", "num_validation", "seed")


class EvaluationEngineConfig(EngineConfig):
    max_completion_length: Length | None = None
    """Maximum completion length in tokens. null for 2048, or less if the model's context is too short."""


class EvaluationScoringConfig(ScoringConfig):
    num_samples: Rows = 1
    """Number k of samples per problem, for avg@k, pass@k and maj@k. If several answers are tied for the majority, maj@k is the fraction of the tied answers that are correct."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the smallest set of most likely tokens whose total probability reaches this value; 1 for all tokens."""
    top_k: NotNegative = 0
    """Sample only from this many of the most likely tokens; 0 for all tokens."""


class EvaluationGradingConfig(GradingConfig):
    functions: StringList = ()
    """Reward functions, as in training. The first one decides whether a response is correct."""


# Fields that an evaluation inherits from the config of a training run, keyed by section.
INHERITED: Mapping[str, Collection[str]] = {
    "data": DataConfig.model_fields.keys(),
    "rewards": EvaluationGradingConfig.model_fields.keys(),
    "sampling": {"max_completion_length"},
    "evaluation": ScoringConfig.model_fields.keys(),
}


class EvaluateConfig(TaskConfig):
    """All settings of an evaluation."""

    output_dir: Annotated[str, Field(min_length=1)] | None = None
    """Directory for the results. If it contains an evaluation, that evaluation is resumed. null for evaluations/MODEL, followed by a hash of the fields that differ from their defaults."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed for sampling."""
    model: PretrainedConfig = PretrainedConfig()
    """The model or the training run to evaluate."""
    data: DataConfig = DataConfig()
    """The problems: files or generated tasks, columns, and prompts."""
    sampling: EvaluationEngineConfig = EvaluationEngineConfig()
    """How responses are sampled: engine, lengths, and concurrency."""
    rewards: EvaluationGradingConfig = EvaluationGradingConfig()
    """The reward functions and the worker processes that execute them."""
    evaluation: EvaluationScoringConfig = EvaluationScoringConfig()
    """Number of samples, temperature, and truncation of the sampling distribution."""

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Self:
        data = self.data
        check_spelling(self.model.path)
        check_options_of_source(data)
        check_files(data, "test_files", "train_files")
        check_model(self.model)
        check_functions(self.rewards.functions, data)
        check_weights(self.rewards, self.rewards.functions)
        return self

    @classmethod
    def _default_source(cls, data: Mapping[str, Any], model: Mapping[str, Any] | None) -> str:
        return FILES if data.get("test_files") else super()._default_source(data, model)

    def _default_folder(self) -> str:
        return f"evaluations/{os.path.basename(os.path.abspath(self.model.path))}"


def load_evaluate_config(file: Path | None, overrides: Sequence[tuple[str, str]]) -> EvaluateConfig:
    """Loads the configuration of an evaluation.

    If `model.path` is a training run, the config of the run provides the defaults for the sections `data` and
    `rewards`, for `sampling.max_completion_length`, and for the temperature and the numbers of samples. By default, the
    run's own test problems are therefore evaluated in the same way as at the end of the run. If files are specified,
    fields that are meant for the run's own problems are not inherited: some fields of `data` and, if these problems
    were generated, the reward functions. If `file` is the config of a training run, only the fields listed above,
    `model.path` and `model.dtype` are used.

    Raises:
      UserError: if there are mistakes. The message has one line per mistake.
    """
    layers = [Layer(str(file), _without_training(read_yaml(file)))] if file else []
    given = merge_layers(layers, overrides)
    model = given.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if isinstance(path, str):
        folder = Path(look_up(path, file.parent) if file else path).expanduser()
        saved = folder / CONFIG_FILE
        if saved.is_file():
            layers = [Layer(str(saved), _defaults_of_run(read_yaml(saved), given)), *layers]
        elif path != BUILT_IN_MODEL and not given.get("data"):
            hint = run_near(folder)
            if hint or not folder.exists():
                raise UserError(
                    f"model.path={path}: no such run{working_directory(folder)}{hint or did_you_mean(path)}; to evaluate a "
                    "model, set data.test_files or data.source as well"
                )
    return load_layers(EvaluateConfig, layers, overrides, file=file)


def run_near(path: Path) -> str:
    """Returns a hint such as `"; did you mean runs/a?"` for a path that is not a run, or an empty string.

    The hint names the run that contains a path such as `RUN/checkpoints/STEP`, or the first run in a folder of runs.
    """
    files = [folder / CONFIG_FILE for folder in path.parents[:3]]
    files += sorted(path.glob(f"*/{CONFIG_FILE}"))
    return next((f"; did you mean {file.parent}?" for file in files if file.is_file()), "")


def is_training_config(data: Mapping[str, Any]) -> bool:
    """Returns whether a config, given as plain data, has fields that exist only for training, not for evaluation."""
    return bool(
        data.keys() & (Config.model_fields.keys() - EvaluateConfig.model_fields.keys())
        or flatten(dict(data)).keys() & (_names(Config) - _names(EvaluateConfig))
    )


def _without_training(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops the fields that evaluations do not use from a training config; returns any other config unchanged."""
    if not is_training_config(data):
        return data
    inherited = {**INHERITED, "model": PretrainedConfig.model_fields.keys()}
    # Unknown fields are kept, so that validation reports them.
    kept = {name: x for name, x in data.items() if name not in Config.model_fields}
    for section in inherited.keys() & data.keys():
        fields, known = data[section], type(Config.model_fields[section].default).model_fields
        if isinstance(fields, Mapping):
            fields = {
                name: x
                for name, x in fields.items()
                if name in inherited[section] or name not in known
            }
        kept[section] = fields
    return kept


def _names(config_class: type[TaskConfig]) -> set[str]:
    return {field.name for field in list_fields(config_class)}


def _defaults_of_run(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in INHERITED.items()
    }
    of_run = defaults["data"]
    own = given.get("data")
    own = own if isinstance(own, dict) else {}
    if own.get("test_files") or own.get("train_files"):
        # The run's values of these fields are meant for its own problems.
        for name in ("max_prompt_length", "overlong_prompts", "limit", "num_train"):
            of_run.pop(name, None)
        for name in OPTIONS_OF_SOURCES:
            of_run.pop(name, None)
        if of_run.pop("source", FILES) != FILES:
            defaults["rewards"].pop("functions", None)
    elif of_run.get("source") == FILES:
        for name in HELD_OUT_BY:
            if name in own and own[name] != of_run.get(name):
                raise UserError(
                    f"data.{name}={own[name]}: the run used {of_run.get(name)}; with a different value, the "
                    "evaluation would include problems that the run was trained on; omit this field or "
                    "set data.test_files"
                )
    return defaults
