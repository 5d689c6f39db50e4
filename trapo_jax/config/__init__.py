"""Configuration: what a run depends on, and how it is read from YAML and the command line."""

from trapo_jax.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    config_from_command_line,
    help_text,
    list_fields,
    load_config,
    parse_command_line,
    read_yaml,
)

__all__ = [
    "Config",
    "DataConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "config_from_command_line",
    "help_text",
    "list_fields",
    "load_config",
    "parse_command_line",
    "read_yaml",
]
