"""The configuration of `trapo_jax.evaluate`, built from the same sections as that of a training run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from trapo_jax.config.loading import load_config, merge_config, read_yaml
from trapo_jax.config.schema import (
    CONFIG_FILE,
    DataConfig,
    EngineConfig,
    GradingConfig,
    Length,
    NotNegative,
    NotNegativeFloat,
    PretrainedConfig,
    Rows,
    StringList,
)
from trapo_jax.config.tasks import FILES
from trapo_jax.config.training import TaskConfig, check_functions, check_model, check_weights
from trapo_jax.types import UserError

# Fields that decide which problems of the training files a run holds out.
HELD_OUT_BY = ("limit", "num_test", "num_validation", "seed")


class EvaluationSamplingConfig(EngineConfig):
    temperature: NotNegativeFloat = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the most likely tokens that together have this probability; 1 for all tokens."""
    top_k: NotNegative = 0
    """Sample only from this many of the most likely tokens; 0 for all tokens."""
    num_samples: Rows = 1
    """Number of samples per problem."""
    max_completion_length: Length | None = None
    """Maximum completion length in tokens. null for 2048, or what the context of the model leaves."""


class EvaluationGradingConfig(GradingConfig):
    functions: StringList = ()
    """Reward functions, as in training. The first decides whether a response is correct."""


class EvaluateConfig(TaskConfig):
    """Everything that an evaluation depends on."""

    output_dir: str | None = None
    """Directory of the results. null for evaluations/<name of the model>. An evaluation that it contains is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of sampling."""
    model: PretrainedConfig = PretrainedConfig()
    data: DataConfig = DataConfig()
    sampling: EvaluationSamplingConfig = EvaluationSamplingConfig()
    rewards: EvaluationGradingConfig = EvaluationGradingConfig()

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Self:
        sampling = self.sampling
        if sampling.temperature == 0 and sampling.num_samples > 1:
            raise ValueError(
                f"sampling.num_samples={sampling.num_samples}: sampling.temperature=0 draws the same sample every "
                "time; give sampling.num_samples=1"
            )
        data = self.data
        check_model(self.model)
        check_functions(self.rewards.functions, data.source)
        check_weights(self.rewards, self.rewards.functions)
        if data.source == FILES and not (data.test_files or data.train_files):
            raise ValueError("data.test_files=[]: data.source=files needs files to evaluate on")
        if data.source != FILES and data.test_files:
            raise ValueError(
                f"data.source={data.source}: data.test_files are not read; give data.source=files"
            )
        return self

    @classmethod
    def _default_source(cls, data: Mapping[str, Any]) -> str:
        return FILES if data.get("test_files") else super()._default_source(data)

    @property
    def folder(self) -> Path:
        """`output_dir` with ~ expanded, or its default."""
        if self.output_dir is not None:
            return Path(os.path.expanduser(self.output_dir))
        return Path("evaluations") / os.path.basename(os.path.abspath(self.model.path))


def load_evaluate_config(file: Path | None, overrides: Sequence[tuple[str, str]]) -> EvaluateConfig:
    """Loads the configuration of an evaluation.

    If `model.path` is a training run, its config gives the defaults of the sections `data` and `rewards` and of
    `sampling.max_completion_length`, so that the run's own test problems are evaluated unless others are given. If the
    run's problems were generated and files are given, the task's defaults do not apply to them.

    Raises:
      UserError: with one line per mistake.
    """
    given = merge_config(file, overrides)
    model = given.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    saved = Path(path).expanduser() / CONFIG_FILE if isinstance(path, str) else None
    defaults = _defaults_of_run(read_yaml(saved), given) if saved and saved.is_file() else None
    return load_config(EvaluateConfig, file, overrides, defaults=defaults)


def _defaults_of_run(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    inherited = {
        "data": DataConfig.model_fields.keys(),
        "rewards": EvaluationGradingConfig.model_fields.keys(),
        "sampling": {"max_completion_length"},
    }
    defaults = {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in inherited.items()
    }
    of_run = defaults["data"]
    own = given.get("data")
    own = own if isinstance(own, dict) else {}
    if own.get("test_files") or own.get("train_files"):
        for name in ("max_prompt_length", "overlong_prompts", "limit"):  # not those of these files
            of_run.pop(name, None)
        if of_run.pop("source", FILES) != FILES:
            defaults["rewards"].pop("functions", None)
    elif of_run.get("source") == FILES:
        for name in HELD_OUT_BY:
            if name in own and own[name] != of_run.get(name):
                raise UserError(
                    f"data.{name}={own[name]}: the run has {of_run.get(name)}, and with another value problems that it was "
                    "trained on would be evaluated; leave it out, or give data.test_files"
                )
    return defaults
