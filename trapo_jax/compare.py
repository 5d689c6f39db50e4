"""Compares methods at an equal budget: executes the runs that are not yet complete, and writes a report.

    python -m trapo_jax.compare --methods trapo,grpo,sft_then_grpo --seeds 5 --match trained_tokens \\
        --budget 400000 --sweep learning_rate=1e-4,2e-4,4e-4 --out comparisons/first [FIELD=VALUE ...]

The comparison first checks the train step of each method: the gradient of a batch must not depend on how the batch is
split into micro-batches. Then every method is tuned on the validation split with the same number of trials, trained
with new seeds, and evaluated once on the test split. To resume a comparison that was stopped, run the same command
again.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from trapo_jax.comparison import (
    Grid,
    compare,
    parse_sweep,
    parse_variant,
    write_report,
)
from trapo_jax.config import parse_command_line
from trapo_jax.inputs.paths import find_config
from trapo_jax.runs.budget import UNITS
from trapo_jax.runs.command_line import (
    EXIT_INTERRUPTED,
    ArgumentParser,
    command,
    fail,
    run_and_exit,
)
from trapo_jax.runs.console import Console
from trapo_jax.types import Interrupted

EXIT_RUN_FAILED = 1
MAX_COUNT = 10_000


@command
def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    console = Console()
    try:
        grid = make_grid(args)
        command = shlex.join(["python", "-m", "trapo_jax.compare", *arguments])
        comparison = compare(grid, args.out, command=command, jobs=args.jobs, say=console.say)
        markdown, files = write_report(comparison, args.out)
    except (Interrupted, KeyboardInterrupt):
        return fail("stopped; the same command resumes the comparison", EXIT_INTERRUPTED)
    for line in markdown.splitlines():
        console.say(line)
    console.say(f"{args.out}: {', '.join(files)}")
    console.say(f"{grid.runs}: run directories")
    return EXIT_RUN_FAILED if comparison.failures else 0


def make_grid(args: argparse.Namespace) -> Grid:
    """Returns the grid of runs that the command line describes."""
    return Grid(
        config_file=args.config,
        overrides=tuple(parse_command_line(args.overrides)[1]),
        methods=tuple(args.methods.split(",")),
        variants=tuple(map(parse_variant, args.variant)),
        sweeps=tuple(map(parse_sweep, args.sweep)),
        num_trials=args.trials,
        num_seeds=args.seeds,
        num_tuning_seeds=args.tuning_seeds,
        match=args.match,
        budget=args.budget,
        runs=args.runs or args.out / "runs",
        records=args.records or args.out / "records",
        margin=args.margin,
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m trapo_jax.compare",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="FIELD=VALUE overrides a config field in all runs, as in trapo_jax.train.",
    )
    add = parser.add_argument
    add(
        "--config",
        type=find_config,
        help="YAML file, or name of a shipped config, for all runs (default: all fields have their default values)",
    )
    add(
        "--methods",
        required=True,
        metavar="NAME,...",
        help="methods to compare: names as in method.name, or variants",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: method.name=METHOD FIELD=VALUE ...'",
        help="define a variant: a method with custom settings, under a name that --methods can list; may be repeated",
    )
    add(
        "--seeds",
        type=_positive,
        default=10,
        metavar="N",
        help="number of runs per method (default 10)",
    )
    add(
        "--match",
        choices=sorted(UNITS),
        default="trained_tokens",
        help="unit of --budget (default trained_tokens)",
    )
    add("--budget", type=_amount, required=True, metavar="AMOUNT", help="budget of every run")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="[METHOD,...:]FIELD=VALUE,...",
        help="tune this field on the validation split; may be repeated. A sweep without methods applies to all methods "
        "that no other sweep names. All methods must have the same number of trials",
    )
    add(
        "--trials",
        type=_positive,
        metavar="N",
        help="try N settings of each method: the configured one, and N - 1 drawn at random from all combinations of "
        "the values in its sweeps (default: try all combinations)",
    )
    add(
        "--tuning-seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="number of runs for each of the best quarter of the trials; the other trials have one run (default 1)",
    )
    add(
        "--margin",
        type=_amount,
        default=0.05,
        metavar="X",
        help="call two methods equivalent if the confidence interval of their accuracy difference lies within +-X "
        "(default 0.05)",
    )
    add(
        "--jobs",
        type=_positive,
        metavar="N",
        help="maximum number of concurrent runs (default: one per CPU core; 1 on an accelerator)",
    )
    _add_folders(parser)
    add("overrides", nargs="*", metavar="FIELD=VALUE")
    return parser.parse_intermixed_args(arguments)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the report")
    add(
        "--runs",
        type=Path,
        metavar="DIR",
        help="directory for the runs; comparisons with the same directory share runs (default OUT/runs)",
    )
    add(
        "--records",
        type=Path,
        metavar="DIR",
        help="directory for the records of completed runs, used to make the report (default OUT/records). Records "
        "from several machines can be copied into one directory; a run with a record is not repeated",
    )


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= MAX_COUNT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_COUNT:,}")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive finite number")
    return number


if __name__ == "__main__":
    run_and_exit(main)
