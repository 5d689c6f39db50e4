"""Defines the configurations of the commands and reads them from YAML files and the command line."""

from trapo_jax.config.changes import flatten, is_changeable
from trapo_jax.config.evaluation import (
    EvaluateConfig,
    is_training_config,
    load_evaluate_config,
    run_near,
)
from trapo_jax.config.help import help_if_requested, list_fields, list_sections
from trapo_jax.config.loading import as_override, load_config, load_train_config, parse_command_line
from trapo_jax.config.schema import (
    CONFIG_FILE,
    ColumnPreset,
    DataConfig,
    EngineConfig,
    GradingConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PretrainedConfig,
    ScoringConfig,
)
from trapo_jax.config.training import Config, default_settings
from trapo_jax.config.user_code import SourceFile, user_code
from trapo_jax.config.yaml_files import read_yaml

__all__ = [
    "CONFIG_FILE",
    "ColumnPreset",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "GradingConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "PretrainedConfig",
    "ScoringConfig",
    "SourceFile",
    "as_override",
    "default_settings",
    "flatten",
    "help_if_requested",
    "is_changeable",
    "is_training_config",
    "list_fields",
    "list_sections",
    "load_config",
    "load_evaluate_config",
    "load_train_config",
    "parse_command_line",
    "read_yaml",
    "run_near",
    "user_code",
]
