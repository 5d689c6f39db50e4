"""Previews the problems of a run exactly as training would see them, without training.

    python -m trapo_jax.preview [--config FILE] [FIELD=VALUE ...]

The command reads the first rows of each file (100, unless data.limit is set), renders the prompts, grades the expert
solutions, and shows what `trapo_jax.train` would show before training, followed by the expert solutions of the first
problem. The weights of the model are not loaded.
"""

from collections.abc import Sequence

from trapo_jax.config import Config, help_if_requested, load_config, parse_command_line
from trapo_jax.data.preflight import Preflight, check_data, show_text
from trapo_jax.data.splits import LoadedData, load_data
from trapo_jax.models import PretrainedModel, check_weights, open_model
from trapo_jax.rollouts.actor import check_staleness, grader_for
from trapo_jax.runs.command_line import command, run_and_exit
from trapo_jax.runs.console import Console
from trapo_jax.runs.trackers import find_tracker
from trapo_jax.sampling.engine import check_engine
from trapo_jax.types import UserError

ABOUT = "Previews the problems of a run exactly as training would see them. Takes the same fields as trapo_jax.train."
DEFAULTS = {"data": {"limit": 100}}


def preview(config: Config) -> tuple[PretrainedModel, LoadedData, Preflight]:
    """Loads and checks the problems of a run.

    Args:
      config: the configuration of the run.

    Raises:
      UserError: for a mistake in the config, the model folder or the data.
    """
    method = config.method.make()
    model = open_model(config.model, config.lora)
    if model.repo is None:  # The weights of a Hub model may not have been downloaded.
        check_weights(model.folder, model.decoder)
    check_engine(config.sampling.engine)
    check_staleness(config.sampling.max_staleness, method)
    for name in config.trackers:
        find_tracker(name)
    data, config = load_data(config, method, model.tokenizer, context_len=model.max_context_len)
    with grader_for(config.rewards, config.rewards.functions, model.tokenizer) as grader:
        return model, data, check_data(data, config, method, grader)


@command
def main(arguments: Sequence[str]) -> int:
    if text := help_if_requested(arguments, Config, "preview", ABOUT):
        print(text)
        return 0
    file, overrides = parse_command_line(arguments)
    model, data, preflight = preview(load_config(Config, file, overrides, defaults=DEFAULTS))
    console = Console()
    preflight.show(console)
    first = data.splits["train"][0]
    for i, expert in enumerate(first.experts):
        show_text(f"expert solution {i + 1}", model.tokenizer.decode(expert.token_ids), console)
    if preflight.errors:
        raise UserError(*preflight.errors)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
