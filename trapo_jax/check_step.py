"""Checks that the gradient of a batch does not depend on how the batch is split into micro-batches.

    python -m trapo_jax.check_step CONFIG.yaml ...

Before its first run, `trapo_jax.compare` performs this check for every method, with the model and the problems of the
comparison. See `trapo_jax.training.gradient_check`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from trapo_jax.config import Config, load_config
from trapo_jax.runs.command_line import ArgumentParser, command, run_and_exit
from trapo_jax.training.gradient_check import check_config


@command
def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m trapo_jax.check_step", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="YAML config file of a run"
    )
    args = parser.parse_args(arguments)
    differences = {str(file): check_config(load_config(Config, file)) for file in args.configs}
    print(json.dumps({"device": jax.default_backend(), "largest_differences": differences}))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
