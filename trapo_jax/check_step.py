"""Checks that the gradient of a batch does not depend on how the batch is cut into micro-batches.

    python -m trapo_jax.check_step CONFIG.yaml ...

`trapo_jax.compare` runs this check first, with the model and the problems of its runs, for every method that it
compares. See `trapo_jax.training.gradient_check`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from trapo_jax.config import Config, load_config
from trapo_jax.data.splits import load_splits
from trapo_jax.methods import make_method
from trapo_jax.models import open_model
from trapo_jax.runs.command_line import EXIT_USER_ERROR, as_command, fail
from trapo_jax.training.gradient_check import BrokenTrainStep, check_gradient
from trapo_jax.types import UserError

EXIT_BROKEN = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.check_step", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="the config of a run"
    )
    args = parser.parse_args(arguments)
    try:
        differences = {
            str(file): check_config(load_config(Config, file, [])) for file in args.configs
        }
    except BrokenTrainStep as error:
        return fail(str(error), EXIT_BROKEN)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    print(json.dumps({"device": jax.default_backend(), "largest_differences": differences}))
    return 0


def check_config(config: Config) -> float:
    """Checks the train step of a run; returns the largest relative difference of gradients."""
    model = open_model(config.model, config.lora)
    splits, _ = load_splits(config.data, model.tokenizer)
    return check_gradient(
        config, make_method(config.method.name, **config.method.constants), model, splits["train"]
    )


if __name__ == "__main__":
    as_command(main)
