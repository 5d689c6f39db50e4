"""Checks the problems of runs, and that their gradients do not depend on how a batch is split into micro-batches.

    python -m trapo_jax.check_step CONFIG.yaml ...

Before its first run, `trapo_jax.compare` performs this check for every method, with the model and the problems of the
comparison. See `trapo_jax.training.gradient_check`.
"""

import json
from collections.abc import Sequence

import jax

from trapo_jax.config import Config, load_config
from trapo_jax.data.preflight import check_data
from trapo_jax.data.splits import load_data
from trapo_jax.inputs.paths import find_config
from trapo_jax.models import open_model, with_weights
from trapo_jax.rollouts.actor import check_staleness, grader_for
from trapo_jax.runs.command_line import ArgumentParser, command, run_and_exit
from trapo_jax.training.gradient_check import check_gradient
from trapo_jax.types import UserError


def check_run(config: Config) -> float:
    """Checks a run's problems as `trapo_jax.train` does before it trains, then its train step; see `check_gradient`.

    Raises:
      UserError: for a mistake in the config, the model folder or the data.
      BrokenTrainStep: if the check of the train step fails.
    """
    model = open_model(config.model, config.lora)
    method = config.method.make()
    check_staleness(config.sampling.max_staleness, method)
    data, config = load_data(config, method, model.tokenizer, context_len=model.max_context_len)
    with grader_for(config.rewards, config.rewards.functions, model.tokenizer) as grader:
        errors = check_data(data, config, method, grader).errors
    if errors:
        raise UserError(*errors)
    return check_gradient(config, method, with_weights(model), data.splits["train"])


@command
def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m trapo_jax.check_step", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "configs",
        nargs="+",
        type=find_config,
        metavar="CONFIG",
        help="YAML file, or name of a shipped config",
    )
    args = parser.parse_args(arguments)
    differences = {str(file): check_run(load_config(Config, file)) for file in args.configs}
    print(json.dumps({"device": jax.default_backend(), "largest_differences": differences}))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
