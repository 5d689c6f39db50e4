"""The configuration of `trapo_jax.evaluate`, built from the same sections as that of a training run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from trapo_jax.config.loading import load_config, read_yaml
from trapo_jax.config.schema import (
    CONFIG_FILE,
    DataConfig,
    EngineConfig,
    GradingConfig,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PretrainedConfig,
    Section,
    StringList,
    check_weights,
)


class EvaluationDataConfig(DataConfig):
    limit: Positive | None = None
    """Number of rows read from each of data.test_files; null for all."""
    template: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Chat template; null for the tokenizer's own, or chatml for messages and none for plain text if it has none."""
    max_prompt_length: Positive = 1024
    """Maximum prompt length in tokens."""
    overlong_prompts: Literal["drop", "truncate", "error"] = "drop"
    """What to do with longer prompts: drop the problem, keep the end of the prompt (truncate), or stop with an error."""


class EvaluationSamplingConfig(EngineConfig):
    temperature: NotNegativeFloat = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the most likely tokens that together have this probability; 1 for all tokens."""
    top_k: NotNegative = 0
    """Sample only from this many of the most likely tokens; 0 for all tokens."""
    num_samples: Positive = 1
    """Number of samples per problem."""
    max_completion_length: Positive = 2048
    """Maximum completion length in tokens."""


class EvaluationGradingConfig(GradingConfig):
    functions: Annotated[StringList, Field(min_length=1)] | None = None
    """Reward functions, as in training. The first decides whether a response is correct. null for card_shuffles on that task and math on files."""


class EvaluateConfig(Section):
    """Everything that an evaluation depends on."""

    output_dir: str | None = None
    """Directory of the results. null for evaluations/<name of the model>. An evaluation that it contains is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of sampling."""
    model: PretrainedConfig = PretrainedConfig()
    data: EvaluationDataConfig = EvaluationDataConfig()
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
        check_weights(self.rewards, self.functions)
        if self.data.source == "files" and not (self.data.test_files or self.data.train_files):
            raise ValueError("data.test_files=[]: data.source=files needs files to evaluate on")
        return self

    @property
    def folder(self) -> Path:
        """`output_dir` with ~ expanded, or its default."""
        if self.output_dir is not None:
            return Path(os.path.expanduser(self.output_dir))
        return Path("evaluations") / os.path.basename(os.path.abspath(self.model.path))

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the reward functions."""
        if self.rewards.functions is not None:
            return self.rewards.functions
        is_card_shuffles = self.data.source == "card_shuffles" and not self.data.test_files
        return ("card_shuffles",) if is_card_shuffles else ("math",)


def load_evaluate_config(file: Path | None, overrides: Sequence[tuple[str, str]]) -> EvaluateConfig:
    """Loads the configuration of an evaluation.

    If `model.path` is a training run, its config gives the defaults of the sections `data` and `rewards` and of
    `sampling.max_completion_length`, so that the run's own test problems are evaluated unless others are given.

    Raises:
      UserError: with one line per mistake.
    """
    config = load_config(EvaluateConfig, file, overrides)
    saved = Path(config.model.path).expanduser() / CONFIG_FILE
    if not saved.is_file():
        return config
    return load_config(EvaluateConfig, file, overrides, defaults=_defaults_of_run(read_yaml(saved)))


def _defaults_of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "data": EvaluationDataConfig.model_fields,
        "rewards": EvaluationGradingConfig.model_fields,
        "sampling": {"max_completion_length"},
    }
    return {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in known.items()
    }
