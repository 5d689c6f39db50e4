"""Configuration: what a command depends on, and how it is read from YAML and the command line."""

from trapo_jax.config.help import help_text, list_fields
from trapo_jax.config.loading import load_config, parse_command_line, read_yaml
from trapo_jax.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "help_text",
    "list_fields",
    "load_config",
    "parse_command_line",
    "read_yaml",
]
