"""Reports a run's memory requirements, and bounds on its speed, for devices that need not be attached.

    python -m trapo_jax.plan --config FILE --topology v5p:2x2x4 [--topology v5e:4x4 ...] [--json] [FIELD=VALUE ...]

The command compiles the actual train step, prefill and decode segment ahead of time, for a TPU topology (requires the
extra `tpu`, but no TPU) or for simulated host devices (`cpu:8`), and compares their requirements with the memory and
the published peak rates of the chips. From the model folder, it reads only config.json.

The reported times are lower bounds, not predictions: each is the time that the FLOPs, the memory traffic or the
collectives alone would take at the published peak rate. All rows of the train step are assumed to be full.
"""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

from trapo_jax.config import Config, load_config, parse_command_line
from trapo_jax.inputs.paths import find_config
from trapo_jax.planning.plan import make_plan
from trapo_jax.planning.table import print_comparison, print_plan
from trapo_jax.planning.topology import find_topology
from trapo_jax.runs.command_line import ArgumentParser, command, run_and_exit
from trapo_jax.runs.console import table_width

EXIT_DOES_NOT_FIT = 1
MIN_WIDTH = 110  # minimum width of the tables, in characters


@command
def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    output = Console(stderr=args.json)
    width = max(MIN_WIDTH, table_width(output))
    console = Console(stderr=args.json, highlight=False, width=width)
    plans = []
    config = load_config(Config, args.config, parse_command_line(args.overrides)[1])
    for name in args.topology:
        topology = find_topology(name)
        console.print(f"compiling for {name} ...")
        plans.append(make_plan(config, topology))
        print_plan(plans[-1], console)
    if len(plans) > 1:
        print_comparison(plans, console)
    if args.json:
        print(json.dumps({"plans": [plan.to_json() for plan in plans]}))
    return EXIT_DOES_NOT_FIT if any(plan.fits is False for plan in plans) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m trapo_jax.plan",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="FIELD=VALUE overrides a config field, as in trapo_jax.train.",
    )
    parser.add_argument(
        "--config",
        type=find_config,
        help="YAML file, or name of a shipped config (default: all fields have their default values)",
    )
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="CHIP:SHAPE",
        help="v5e:4x4, v5p:2x2x4, v6e:4x4 ... for a TPU slice, or cpu:8 for simulated host devices; may be repeated",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object to standard output, and the tables to standard error",
    )
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_and_exit(main)
