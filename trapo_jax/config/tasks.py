"""Defines the defaults of each task. They replace the schema's defaults, which suit pretrained language models."""

from collections.abc import Mapping
from typing import Any

FILES = "files"
BUILT_IN_MODEL = "card_shuffles_tiny"

# Defaults by section and field, keyed by `data.source`.
TASKS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "card_shuffles": {
        "model": {"path": BUILT_IN_MODEL},
        "data": {
            "num_train": 128,
            "num_validation": 256,
            "num_test": 256,
            "max_prompt_length": 16,
            "overlong_prompts": "error",
        },
        "sampling": {"max_completion_length": 64},
        "rewards": {"functions": ["card_shuffles"]},
        "train": {
            "num_steps": 375,
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "decay_start": 0.5,
            "adam_b2": 0.98,
        },
        "evaluation": {"every": 125, "num_samples": 8, "temperature": 1.0},
        "checkpoint": {"every": 75},
    },
    "reasoning_gym": {
        "data": {
            "num_train": 4096,
            "num_validation": 128,
            "num_test": 128,
            "prompt_suffix": "boxed",
        },
        "rewards": {"functions": ["reasoning_gym"]},
    },
    FILES: {},
}

# Fields of `data` that apply to a single source of problems.
OPTIONS_OF_SOURCES: Mapping[str, str] = {
    "difficulty": "card_shuffles",
    "expert_style": "card_shuffles",
    "task": "reasoning_gym",
    "task_options": "reasoning_gym",
}
