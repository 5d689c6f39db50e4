"""Configurations of the commands, and how they are read from YAML files and the command line."""

from trapo_jax.config.evaluation import EvaluateConfig, load_evaluate_config
from trapo_jax.config.help import help_text, list_fields
from trapo_jax.config.loading import load_config, parse_command_line, read_yaml
from trapo_jax.config.schema import (
    CONFIG_FILE,
    Config,
    DataConfig,
    EngineConfig,
    GradingConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PretrainedConfig,
)

__all__ = [
    "CONFIG_FILE",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "GradingConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "PretrainedConfig",
    "help_text",
    "list_fields",
    "load_config",
    "load_evaluate_config",
    "parse_command_line",
    "read_yaml",
]
